"""The training loop: updates, logs, images, checkpoints, and an orderly end whatever comes."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from rlr_peft.build.machine import peak_memory_mb
from rlr_peft.config import Config, config_to_dict, save_config, stages_from_config
from rlr_peft.foreign_text import printable
from rlr_peft.training.checkpoints import CheckpointManager
from rlr_peft.training.interruption import GracefulInterruption
from rlr_peft.training.output_dir import CONFIG, claim_output_dir
from rlr_peft.training.progress import Progress, is_due_after
from rlr_peft.training.resuming import open_checkpoints, resume, save_checkpoint
from rlr_peft.training.run import Run
from rlr_peft.training.tracking import METRICS_LOG, MetricsError, MetricsLog
from rlr_peft.training.update import Update, calibrate, calibration_due, take_update
from rlr_peft.training.validation import save_validation_images

logger = logging.getLogger(__name__)


def train(
    run: Run, progress: Progress | None = None, publish_checkpoint: Callable[[Path], None] | None = None
) -> Progress:
    """Trains from where `resume` put the run to the last step or the first signal.

    Args:
        run: as `build_run` made it.
        progress: what `resume` returned; None calls it.
        publish_checkpoint: given the folder of every checkpoint that the config says to publish; must not wait.

    Returns:
        How far it came; ``interrupted_by`` is not 0 if a signal ended it early, after a checkpoint.
    """
    progress = resume(run) if progress is None else progress
    if run.accelerator.is_main_process:
        is_latest = run.config.checkpointing.resume_from_checkpoint == "latest"
        aside = claim_output_dir(run.output_dir, progress.resumed_from, progress.step, is_latest=is_latest)
        if aside is not None:
            logger.warning("What another course of training left in %s was moved to %s.", run.output_dir, aside)
        save_config(run.config, run.output_dir / CONFIG)
    run.accelerator.init_trackers(run.config.logging.tracker_name, config=_tracker_config(run.config))
    _announce(run, progress)
    with ExitStack() as stack:
        interruption = stack.enter_context(GracefulInterruption())
        log = None
        if run.accelerator.is_main_process:
            log = stack.enter_context(MetricsLog(run.output_dir / METRICS_LOG, progress.step or None))
        _loop(run, progress, log, interruption, publish_checkpoint)
    return progress


def _loop(
    run: Run,
    progress: Progress,
    log: MetricsLog | None,
    interruption: GracefulInterruption,
    publish_checkpoint: Callable[[Path], None] | None,
) -> None:
    config, last_step, checkpoints = run.config, run.arithmetic.max_train_steps, open_checkpoints(run)
    if progress.step == 0 and config.validation.validation_steps:
        save_validation_images(run, 0, "validation")
    if progress.step >= last_step:
        logger.warning("Nothing is left to train: %d of %d updates are done.", progress.step, last_step)
    bar = tqdm(desc="Steps", initial=progress.step, total=last_step, disable=not run.accelerator.is_local_main_process)
    with bar:
        while progress.step < last_step and not progress.stopped_early:
            started, evaluated = time.monotonic(), run.chain.denoiser_evaluations
            with run.processes.doing(f"update {progress.step + 1}"):
                if calibration_due(run, progress.step):
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
            if is_due_after(progress.step, config.validation.validation_steps) and progress.step < last_step:
                save_validation_images(run, progress.step, "validation")
            _stop_early(run, progress, update)
            is_last = progress.step == last_step or bool(progress.stopped_early)
            # Any process may have got the signal; all must act on it at the same step.
            stop = run.processes.largest(interruption.exit_code, "the signals")
            if stop or is_last or is_due_after(progress.step, config.checkpointing.checkpointing_steps):
                path = _save(run, progress, checkpoints, log)
                if publish_checkpoint is not None and is_due_after(progress.step, config.hub.push_every):
                    publish_checkpoint(path)
            if stop and not is_last:  # after the last one what is left is the result, which a second signal ends
                progress.interrupted_by = stop
                break


def _save(run: Run, progress: Progress, checkpoints: CheckpointManager, log: MetricsLog | None) -> Path:
    """Saves a checkpoint, with the metrics' lines on the disk before it; those that cannot be are told of after it."""
    unwritten: OSError | None = None
    if log is not None:
        try:
            log.synchronize()
        except OSError as error:
            unwritten = error
    with run.processes.doing(f"saving checkpoint-{progress.step}"):
        path = save_checkpoint(run, progress, checkpoints)
    if log is not None and not (run.output_dir / CONFIG).exists():
        save_config(run.config, run.output_dir / CONFIG)
        logger.warning("%s was removed while the run wrote to it: it is there again.", run.output_dir / CONFIG)
    if unwritten is not None:
        raise MetricsError(
            f"{log and log.path} cannot be written ({unwritten}). {path} is complete: mend the cause and go on with "
            "--resume_from_checkpoint latest."
        ) from unwritten
    return path


def _log(run: Run, progress: Progress, update: Update, log: MetricsLog | None) -> None:
    metrics: dict[str, Any] = update.metrics() | {
        "lr": run.lr_scheduler.get_last_lr()[0],
        "denoiser_evaluations": progress.denoiser_evaluations,
    }
    if log is not None:
        log.log(metrics, progress.step)
        run.learning_signal.check(progress.step, metrics)
    _track(run, metrics | {"seconds": progress.seconds}, progress.step)


def _track(run: Run, metrics: Mapping[str, Any], step: int) -> None:
    """Hands the numbers to the trackers, whose files may be removed by somebody: the run does not depend on them."""
    folder = run.output_dir / run.config.logging.logging_dir / run.config.logging.tracker_name
    if run.accelerator.trackers and not folder.exists():
        folder.mkdir(parents=True)
        logger.warning("%s was removed while the run wrote to it: its curves begin anew.", folder)
    run.accelerator.log(dict(metrics), step=step)


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


def _say_coverage(run: Run, progress: Progress, update: Update) -> None:
    """Says what the estimate covers whenever that changes, and which score terms sit on hot steps."""
    coverage = update.coverage.describe()
    if coverage != progress.coverage:
        logger.log(logging.INFO if update.coverage.unbiased else logging.WARNING, "Coverage: %s", coverage)
        for t, ratio in update.books[0].hot_steps.items():
            logger.warning("Step %d has a score term although |d mean / d output| / std = %.1f there: noisy.", t, ratio)
    progress.coverage = coverage


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
    """Plain numbers and texts, without secrets: trackers may be public."""
    values = config_to_dict(config).items()
    return {name: value if isinstance(value, (bool, int, float)) else printable(str(value)) for name, value in values}


def _total(run: Run, count: int) -> int:
    """Sum of a count over all processes."""
    if run.accelerator.num_processes == 1:
        return count
    return int(run.processes.sum(torch.tensor(count, device=run.accelerator.device), "the denoiser evaluations"))
