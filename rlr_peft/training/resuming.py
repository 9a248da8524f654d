"""A run's state into a checkpoint and back."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from rlr_peft.build.optimizer import restore_optimizer
from rlr_peft.build.randomness import capture_random_states, restore_random_states
from rlr_peft.config import ConfigError, HubArguments, config_to_yaml
from rlr_peft.lora import lora_parameters, save_lora
from rlr_peft.plain_files import PlainFileError, parse_yaml, read_plain_text
from rlr_peft.rewards.combination import WeightedRewards
from rlr_peft.rewards.remote import remote_rewards
from rlr_peft.training.checkpoints import CheckpointManager, LoadedCheckpoint, understanding
from rlr_peft.training.manifest import CheckpointError
from rlr_peft.training.output_dir import CONFIG
from rlr_peft.training.progress import Progress
from rlr_peft.training.run import Run

logger = logging.getLogger(__name__)

KEPT_PROGRESS = ("seconds", "denoiser_evaluations", "peak_memory_mb", "coverage", "stopped_early")
FREE_TO_CHANGE = {
    *("resume_from_checkpoint", "output_dir", "max_train_steps", "report_to", "logging_dir", "tracker_name"),
    *(field.name for field in dataclasses.fields(HubArguments)),
}


def open_checkpoints(run: Run) -> CheckpointManager:
    """The checkpoints in the run's folder."""
    return CheckpointManager(
        run.output_dir,
        total_limit=run.config.checkpointing.checkpoints_total_limit,
        num_processes=run.accelerator.num_processes,
        process_index=run.accelerator.process_index,
        gather=lambda states: run.processes.gather_objects(states, "the checkpoint's states"),
    )


def resume(run: Run) -> Progress:
    """Puts the run where the checkpoint that the config names left it; nothing in the output folder changes yet.

    Before anything that costs time, such as the evaluation of the base: a checkpoint that does not fit shows at once.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, of another adapter or estimator or of another number of
            processes, or the processes do not find the same one.
        ConfigError: the output folder cannot be made.
    """
    try:
        run.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir: expected a folder or a place for one, got {run.output_dir} ({error.strerror}); "
            "choose another."
        ) from error
    checkpoints = open_checkpoints(run)
    path = checkpoints.resolve(run.config.checkpointing.resume_from_checkpoint)
    progress = Progress() if path is None else load_state(run, checkpoints.load(path))
    steps = set(run.processes.gather_objects([progress.step], "the step to go on from"))
    if len(steps) > 1:
        raise CheckpointError(
            f"Expected every process to go on from the same checkpoint, got those of steps {sorted(steps)}: "
            f"{run.output_dir} must be on a disk that all machines share."
        )
    return progress


def save_checkpoint(run: Run, progress: Progress, checkpoints: CheckpointManager) -> Path:
    """Writes all that `resume` needs; returns the checkpoint's folder. Every process must call it."""
    state = {
        "lora": {name: value.detach().cpu() for name, value in lora_parameters(run.chain.denoiser).items()},
        "optimizer_class": type(run.optimizer).__name__,
        "identity": _identity(run),
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "estimator": run.estimator.state_dict(),
        "objective": {"has_gradient": run.objective.has_gradient},
        "reward_scale": None if run.reward_scale is None else run.reward_scale.state_dict(),
        "component_scales": run.reward.state_dict() if isinstance(run.reward, WeightedRewards) else None,
        "server_versions": {reward.name: reward.version for reward in remote_rewards(run.reward, run.heldout)},
        "early_stopping": run.early_stopping.state_dict(),
        "progress": {name: getattr(progress, name) for name in KEPT_PROGRESS},
    }
    return checkpoints.save(
        progress.step,
        state,
        lambda folder: save_lora(run.pipeline, folder),
        process_state=capture_random_states(run.accelerator.device),
    )


def load_state(run: Run, loaded: LoadedCheckpoint) -> Progress:
    """Puts what a checkpoint holds into the run.

    Raises:
        CheckpointError: it is of another run, or holds what this program never wrote.
    """
    with understanding(loaded.path):
        return _load(run, loaded)


def _load(run: Run, loaded: LoadedCheckpoint) -> Progress:
    path, state = loaded.path, loaded.state
    _check_identity(run, path, state["identity"])
    _load_adapter(run, path, state["lora"])
    _check_optimizer(run, path, state["optimizer_class"])
    restore_optimizer(run.optimizer, run.lr_scheduler, state["optimizer"], state["lr_scheduler"])
    run.estimator.load_state_dict(state["estimator"])
    run.objective.has_gradient = bool(state["objective"]["has_gradient"])
    if run.reward_scale is not None and state["reward_scale"] is not None:
        run.reward_scale.load_state_dict(state["reward_scale"])
    if isinstance(run.reward, WeightedRewards):
        run.reward.load_state_dict(state["component_scales"] or {})
    for reward in remote_rewards(run.reward, run.heldout):  # it warns at the first answer of another version
        reward.version = state.get("server_versions", {}).get(reward.name)
    run.early_stopping.load_state_dict(state["early_stopping"])
    restore_random_states(loaded.process_state, run.accelerator.device)
    logger.info("Resuming from %s.", path)
    if run.accelerator.is_main_process:
        _warn_of_changes(run, path.parent / CONFIG)
    return _progress(loaded)


def _identity(run: Run) -> dict[str, str | int]:
    """What the running statistics belong to; another config's could not be used, or would mean something else."""
    return {
        "estimator": run.config.estimator.estimator,
        "num_inference_steps": run.chain.num_steps,
        "denoiser": ", ".join(run.family.denoisers),
    }


def _check_identity(run: Run, path: Path, written: dict[str, str | int]) -> None:
    for name, here in _identity(run).items():
        if written[name] != here:
            raise CheckpointError(
                f"Expected a checkpoint of {name} {here}, got {path}, which is of {name} {str(written[name])[:80]}. "
                f"Resume with --{name} {str(written[name])[:80]}, as in {path.parent / CONFIG}, or start a new run."
            )


def _progress(loaded: LoadedCheckpoint) -> Progress:
    kept = loaded.state["progress"]
    for name, value in kept.items():
        is_text = isinstance(getattr(Progress(), name), str)
        is_right = isinstance(value, str) if is_text else isinstance(value, (int, float)) and 0 <= value < 2**63
        if not is_right:
            raise ValueError(f"{name} is {value!r}"[:100])
    return Progress(step=loaded.step, resumed_from=loaded.path, **kept)


def _load_adapter(run: Run, path: Path, saved: dict[str, torch.Tensor]) -> None:
    current = lora_parameters(run.chain.denoiser)
    there = {name: tuple(value.shape) for name, value in saved.items()}
    here = {name: tuple(value.shape) for name, value in current.items()}
    if there != here:
        raise CheckpointError(
            f"Expected the adapter of {path} to have the {len(here)} weights of this config, got {len(there)}: "
            f"{_first_difference(here, there)}. Resume with the rank, lora_layers, denoiser, use_dora and base that it "
            f"was trained with, see {path.parent / CONFIG}, or start a new run."
        )
    with torch.no_grad():
        for name, value in saved.items():
            current[name].copy_(value)


def _check_optimizer(run: Run, path: Path, written_by: str) -> None:
    here = type(run.optimizer).__name__
    if here != written_by:
        raise CheckpointError(
            f"Expected the state of {here} in {path}, got that of {written_by}. Resume with the config that it was "
            f"trained with, use_8bit_adam above all: {path.parent / CONFIG}."
        )


def _first_difference(here: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> str:
    """Of two adapters' weights, name -> shape, in words."""
    for name in here:
        if name in there and there[name] != here[name]:
            return f"{name} is {here[name]} here and {there[name]} there"
    missing = [name for name in here if name not in there]
    if missing:
        return f"{missing[0]} is not in the checkpoint"
    return f"{next(name for name in there if name not in here)} is not in this run"


def _warn_of_changes(run: Run, saved: Path) -> None:
    """A resumed run equals the uninterrupted one only under the same config."""
    if not saved.exists():
        return
    now: dict[str, Any] = parse_yaml(config_to_yaml(run.config))
    try:
        before: dict[str, Any] = parse_yaml(read_plain_text(saved)) or {}
    except PlainFileError as error:
        logger.warning("Whether the config has changed cannot be told: %s is damaged (%s).", saved, error)
        return
    changed = [name for name in now if name in before and before[name] != now[name] and name not in FREE_TO_CHANGE]
    for name in changed:
        logger.warning("Resumed with another %s: %s instead of %s.", name, now[name], before[name])
