"""The training loop: updates, logs, images, checkpoints, and an orderly end whatever comes."""

import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from rlr_peft.config import Config, HubArguments, config_to_dict, config_to_yaml, save_config, stages_from_config
from rlr_peft.lora import lora_parameters, save_lora
from rlr_peft.publishing.redaction import redacted
from rlr_peft.rewards.combination import WeightedRewards
from rlr_peft.training.checkpoints import CheckpointManager, LoadedCheckpoint
from rlr_peft.training.hardware import peak_memory_mb
from rlr_peft.training.interruption import GracefulInterruption
from rlr_peft.training.manifest import CheckpointError
from rlr_peft.training.random_states import capture_random_states, restore_random_states
from rlr_peft.training.run import Run
from rlr_peft.training.tracking import MetricsLog
from rlr_peft.training.update import Update, calibrate, take_update
from rlr_peft.training.validation import save_validation_images

logger = logging.getLogger(__name__)

METRICS_LOG = "metrics.jsonl"
KEPT_PROGRESS = ("seconds", "denoiser_evaluations", "peak_memory_mb", "coverage", "stopped_early")
FREE_TO_CHANGE = {
    *("resume_from_checkpoint", "output_dir", "max_train_steps", "report_to", "logging_dir", "tracker_name"),
    *(field.name for field in dataclasses.fields(HubArguments)),
}


@dataclass
class Progress:
    """How far a run has come, over all its sessions.

    Attributes:
        step: finished updates.
        seconds: time spent training.
        denoiser_evaluations: of all processes, for training.
        peak_memory_mb: peak memory of the main process, in MB (2**20 bytes).
        coverage: what the estimator's last plan covers, in words.
        stopped_early: why training was stopped before its last step, in one sentence; empty if it was not.
        interrupted_by: exit code of the signal that ended this session early; 0 for none.
    """

    step: int = 0
    seconds: float = 0.0
    denoiser_evaluations: int = 0
    peak_memory_mb: float = 0.0
    coverage: str = ""
    stopped_early: str = ""
    interrupted_by: int = 0


def train(run: Run, publish_checkpoint: Callable[[Path], None] | None = None) -> Progress:
    """Trains from the start, or from the checkpoint that the config names, to the last step or the first signal.

    Args:
        run: as `build_run` made it.
        publish_checkpoint: given the folder of every checkpoint that the config says to publish; must not wait.

    Returns:
        How far it came; ``interrupted_by`` is not 0 if a signal ended it early, after a checkpoint.
    """
    checkpoints = CheckpointManager(
        run.output_dir,
        total_limit=run.config.checkpointing.checkpoints_total_limit,
        num_processes=run.accelerator.num_processes,
        process_index=run.accelerator.process_index,
        gather=gather_object,
    )
    progress = _resume(run, checkpoints)
    if run.accelerator.is_main_process:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        save_config(run.config, run.output_dir / "config.yaml")
    run.accelerator.init_trackers(run.config.logging.tracker_name, config=_tracker_config(run.config))
    _announce(run, progress)
    with ExitStack() as stack:
        interruption = stack.enter_context(GracefulInterruption())
        log = None
        if run.accelerator.is_main_process:
            log = stack.enter_context(MetricsLog(run.output_dir / METRICS_LOG, progress.step or None))
        _loop(run, progress, checkpoints, log, interruption, publish_checkpoint)
    return progress


def _loop(
    run: Run,
    progress: Progress,
    checkpoints: CheckpointManager,
    log: MetricsLog | None,
    interruption: GracefulInterruption,
    publish_checkpoint: Callable[[Path], None] | None,
) -> None:
    config, last_step = run.config, run.arithmetic.max_train_steps
    if progress.step == 0 and config.validation.validation_steps:
        save_validation_images(run, 0, "validation")
    bar = tqdm(desc="Steps", initial=progress.step, total=last_step, disable=not run.accelerator.is_local_main_process)
    with bar:
        while progress.step < last_step and not progress.stopped_early:
            started, evaluated = time.monotonic(), run.chain.denoiser_evaluations
            if _calibration_due(run, progress.step):
                calibrate(run, progress.step)
            update = take_update(run, progress.step)
            progress.step += 1
            progress.seconds += time.monotonic() - started
            progress.denoiser_evaluations += _total(run, run.chain.denoiser_evaluations - evaluated)
            progress.peak_memory_mb = max(progress.peak_memory_mb, peak_memory_mb(run.accelerator.device))
            _say_coverage(run, progress, update)
            _log(run, progress, update, log)
            bar.update()
            bar.set_postfix(reward=f"{update.rewards.mean():.4f}", lr=f"{run.lr_scheduler.get_last_lr()[0]:.2e}")
            if _due(progress.step, config.validation.validation_steps) and progress.step < last_step:
                save_validation_images(run, progress.step, "validation")
            _stop_early(run, progress, update)
            is_last = progress.step == last_step or bool(progress.stopped_early)
            # Any process may have got the signal; all must act on it at the same step.
            stop = _largest(run, interruption.exit_code)
            if stop or is_last or _due(progress.step, config.checkpointing.checkpointing_steps):
                if log is not None:
                    log.synchronize()
                path = _save(run, progress, checkpoints)
                if publish_checkpoint is not None and _due(progress.step, config.hub.push_every):
                    publish_checkpoint(path)
            if stop and not is_last:
                progress.interrupted_by = stop
                break


def _log(run: Run, progress: Progress, update: Update, log: MetricsLog | None) -> None:
    metrics = update.metrics() | {
        "lr": run.lr_scheduler.get_last_lr()[0],
        "denoiser_evaluations": progress.denoiser_evaluations,
    }
    if log is not None:
        log.log(metrics, progress.step)
    run.accelerator.log(metrics | {"seconds": progress.seconds}, step=progress.step)


def _stop_early(run: Run, progress: Progress, update: Update) -> None:
    """Ends training where the early stopping says so, with the weights that it names."""
    heldout = None if update.heldout is None else float(update.heldout.mean())
    kl = None if update.kl is None else float(update.kl.mean())
    reason = run.early_stopping.check(progress.step, heldout, kl, run.chain.parameters)
    if reason is None:
        return
    progress.stopped_early = reason.sentence
    logger.warning("%s", reason.sentence)
    if reason.weights is not None:
        with torch.no_grad():
            for parameter, best in zip(run.chain.parameters, reason.weights, strict=True):
                parameter.copy_(best)


def _calibration_due(run: Run, step: int) -> bool:
    """A reward without gradient leaves nothing to choose; whether it has one may show only with the first samples."""
    is_due = step % run.config.estimator.calibration_interval == 0
    has_choice = run.objective.has_gradient or run.estimator.calibrates_without_gradient
    return run.estimator.needs_calibration and has_choice and is_due


def _say_coverage(run: Run, progress: Progress, update: Update) -> None:
    """Says what the plan covers whenever that changes, and which score terms sit on hot steps."""
    report = update.reports[0]
    coverage = report.coverage.describe()
    if coverage != progress.coverage:
        logger.log(logging.INFO if report.coverage.unbiased else logging.WARNING, "Coverage: %s", coverage)
        for t, ratio in report.hot_steps.items():
            logger.warning("Step %d has a score term although |d mean / d output| / std = %.1f there: noisy.", t, ratio)
    progress.coverage = coverage


def _save(run: Run, progress: Progress, checkpoints: CheckpointManager) -> Path:
    state = {
        "lora": {name: value.detach().cpu() for name, value in lora_parameters(run.chain.denoiser).items()},
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "estimator": run.estimator.state_dict(),
        "objective": {"has_gradient": run.objective.has_gradient},
        "reward_scale": None if run.reward_scale is None else run.reward_scale.state_dict(),
        "component_scales": run.reward.state_dict() if isinstance(run.reward, WeightedRewards) else None,
        "early_stopping": run.early_stopping.state_dict(),
        "progress": {name: getattr(progress, name) for name in KEPT_PROGRESS},
    }
    return checkpoints.save(
        progress.step,
        state,
        lambda folder: save_lora(run.pipeline, folder),
        process_state=capture_random_states(run.accelerator.device),
    )


def _resume(run: Run, checkpoints: CheckpointManager) -> Progress:
    path = checkpoints.resolve(run.config.checkpointing.resume_from_checkpoint)
    if path is None:
        aside = checkpoints.set_aside_earlier()
        if aside is not None:
            logger.warning("Starting from scratch: checkpoints of an earlier run were moved to %s.", aside)
        return Progress()
    loaded = checkpoints.load(path)
    saved: dict[str, torch.Tensor] = loaded.state["lora"]
    current = lora_parameters(run.chain.denoiser)
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in current.items()}:
        raise CheckpointError(
            f"Expected the adapter of {path} to have the layers and ranks of this config, got others. Resume with the "
            f"config that it was trained with: {path.parent / 'config.yaml'}."
        )
    with torch.no_grad():
        for name, value in saved.items():
            current[name].copy_(value)
    run.optimizer.load_state_dict(loaded.state["optimizer"])
    run.lr_scheduler.load_state_dict(loaded.state["lr_scheduler"])
    _load_estimator(run, loaded)
    run.objective.has_gradient = loaded.state["objective"]["has_gradient"]
    if run.reward_scale is not None and loaded.state["reward_scale"] is not None:
        run.reward_scale.load_state_dict(loaded.state["reward_scale"])
    if isinstance(run.reward, WeightedRewards):
        run.reward.load_state_dict(loaded.state["component_scales"] or {})
    run.early_stopping.load_state_dict(loaded.state["early_stopping"])
    restore_random_states(loaded.process_state, run.accelerator.device)
    logger.info("Resuming from %s.", path)
    _warn_of_changes(run, path.parent / "config.yaml")
    return Progress(step=loaded.step, **loaded.state["progress"])


def _load_estimator(run: Run, loaded: LoadedCheckpoint) -> None:
    try:
        run.estimator.load_state_dict(loaded.state["estimator"])
    except KeyError:
        raise CheckpointError(
            f"Expected the running statistics of {run.config.estimator.estimator} in {loaded.path}, got those of "
            f"another estimator. Resume with the config that it was trained with: {loaded.path.parent / 'config.yaml'}."
        ) from None


def _warn_of_changes(run: Run, saved: Path) -> None:
    """A resumed run equals the uninterrupted one only under the same config."""
    if not saved.exists():
        return
    before, now = yaml.safe_load(saved.read_text(encoding="utf-8")), yaml.safe_load(config_to_yaml(run.config))
    changed = [name for name in now if name in before and before[name] != now[name] and name not in FREE_TO_CHANGE]
    for name in changed:
        logger.warning("Resumed with another %s: %s instead of %s.", name, now[name], before[name])


def _announce(run: Run, progress: Progress) -> None:
    training, arithmetic = run.config.training, run.arithmetic
    trainable = sum(parameter.numel() for parameter in run.chain.parameters)
    stages = stages_from_config(run.config)
    for line in (
        "***** Running training *****",
        f"  Base = {run.config.model.pretrained_model_name_or_path}, reward = {run.reward.name}",
        f"  Trainable LoRA parameters = {trainable:,}",
        f"  Prompts = {len(run.prompts)}",
        f"  Samples per update = {training.train_batch_size} on the tape x {training.gradient_accumulation_steps} "
        f"accumulation steps x {run.accelerator.num_processes} processes = {arithmetic.samples_per_update} "
        f"({training.num_images_per_prompt} per prompt)",
        f"  Denoising steps = {run.chain.num_steps}, guidance scale = {run.chain.guidance_scale:g}",
        *([] if stages is None else [f"  Chain-of-Thought = {stages.describe(run.chain.num_steps)}"]),
        f"  Optimization steps = {arithmetic.max_train_steps}, {progress.step} done",
        f"  Estimator = {run.config.estimator.estimator}: {run.estimator.describe()}",
    ):
        logger.info(line)


def _tracker_config(config: Config) -> dict[str, Any]:
    """Trackers may be public: the address of a reward server may hold a password."""
    values = config_to_dict(config).items()
    return {name: value if isinstance(value, (bool, int, float)) else redacted(str(value)) for name, value in values}


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _largest(run: Run, number: int) -> int:
    """The largest of the processes' numbers."""
    return int(run.accelerator.gather(torch.tensor([number], device=run.accelerator.device)).max())


def _total(run: Run, count: int) -> int:
    """Sum of a count over all processes."""
    if run.accelerator.num_processes == 1:
        return count
    return int(run.accelerator.reduce(torch.tensor(count, device=run.accelerator.device), reduction="sum"))
