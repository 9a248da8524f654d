"""A run goes on exactly where a checkpoint left it, and its folder holds its own course of training alone."""

import itertools
import logging
import os
import random
import re
import shutil
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from rlr_peft.build.optimizer import restore_ema, restore_optimizer
from rlr_peft.build.run import Run
from rlr_peft.config import ConfigError, HubArguments, config_to_yaml
from rlr_peft.errors import UserError
from rlr_peft.files import PlainFileError, parse_yaml, read_plain_text, replacing_file
from rlr_peft.lora import lora_parameters, save_lora
from rlr_peft.publishing.record import RECORD_NAME
from rlr_peft.publishing.uploads import PUBLISHED
from rlr_peft.training.checkpoints import (
    CheckpointError,
    CheckpointManager,
    LoadedCheckpoint,
    checkpoint_folders,
    understanding,
)
from rlr_peft.training.progress import PROGRESS_PAGE, VALIDATION, EarlyStopping, Progress
from rlr_peft.training.tracking import METRICS_LOG

logger = logging.getLogger(__name__)

KEPT_PROGRESS = ("seconds", "denoiser_evaluations", "peak_memory_mb", "coverage", "stopped_early")
FREE_TO_CHANGE = {
    *("resume_from_checkpoint", "output_dir", "max_train_steps", "report_to", "logging_dir", "tracker_name"),
    *(field.name for field in fields(HubArguments)),
}


class RandomStatesError(UserError, RuntimeError):
    """States of generators that this process does not have."""


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
        CheckpointError: the checkpoint is missing, damaged, or of another adapter or estimator, or the processes do not
            find the same one.
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
    progress = _fresh_progress(run) if path is None else load_state(run, checkpoints.load(path))
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
        "ema": {} if run.ema is None else run.ema.state_dict(),
        "rollback": {} if run.rollback is None else run.rollback.state_dict(),
        "estimator": run.estimator.state_dict(),
        "reward": run.reward.state_dict(),
        "heldout": {} if run.heldout is None else run.heldout.state_dict(),
        "early_stopping": progress.early_stopping.state_dict(),
        "progress": {name: getattr(progress, name) for name in KEPT_PROGRESS},
    }

    def save_adapter(folder: Path) -> None:
        with run.averaged():
            save_lora(run.pipeline, folder)

    random_states = capture_random_states(run.accelerator.device)
    return checkpoints.save(progress.step, state, save_adapter, process_state=random_states)


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
    if run.ema is not None:
        restore_ema(run.ema, state["ema"])
    if run.rollback is not None and state["rollback"]:
        run.rollback.load_state_dict(state["rollback"])
    run.estimator.load_state_dict(state["estimator"])
    run.reward.load_state_dict(state["reward"])
    if run.heldout is not None:
        run.heldout.load_state_dict(state["heldout"])
    if loaded.process_state is not None:  # a process that is new has its own, as at a start
        restore_random_states(loaded.process_state, run.accelerator.device)
    logger.info("Resuming from %s.", path)
    if run.accelerator.is_main_process:
        _warn_of_changes(run, path.parent / CONFIG)
    return _progress(run, loaded)


def _identity(run: Run) -> dict[str, str | int]:
    """What the running statistics belong to; another config's could not be used, or would mean something else."""
    return {
        "estimator": run.method,
        "reward_fn": re.sub("://[^/ ]+", "://HOST", run.reward.name),  # a server may have moved
        "num_inference_steps": run.chain.num_steps,
        "denoiser": ", ".join(run.family.denoisers),
        "use_ema": str(run.config.optimizer.use_ema).lower(),
    }


def _check_identity(run: Run, path: Path, written: dict[str, str | int]) -> None:
    for name, here in _identity(run).items():
        if written[name] != here:
            raise CheckpointError(
                f"Expected a checkpoint of {name} {here}, got {path}, which is of {name} {str(written[name])[:80]}. "
                f"Resume with the {name} of {path.parent / CONFIG}, or start a new run; with --init_adapter {path} it "
                "goes on from these weights."
            )


def _fresh_progress(run: Run) -> Progress:
    regularization = run.config.regularization
    return Progress(early_stopping=EarlyStopping(regularization.early_stopping_steps, regularization.kl_limit))


def _progress(run: Run, loaded: LoadedCheckpoint) -> Progress:
    progress, kept = _fresh_progress(run), loaded.state["progress"]
    progress.early_stopping.load_state_dict(loaded.state["early_stopping"])
    for name, value in kept.items():
        is_text = isinstance(getattr(progress, name), str)
        is_right = isinstance(value, str) if is_text else isinstance(value, (int, float)) and 0 <= value < 2**63
        if not is_right:
            raise ValueError(f"{name} is {value!r}"[:100])
    return replace(progress, step=loaded.step, resumed_from=loaded.path, **kept)


def _load_adapter(run: Run, path: Path, saved: dict[str, torch.Tensor]) -> None:
    current = lora_parameters(run.chain.denoiser)
    there = {name: tuple(value.shape) for name, value in saved.items()}
    here = {name: tuple(value.shape) for name, value in current.items()}
    if there != here:
        raise CheckpointError(
            f"Expected the adapter of {path} to be that of this config, got another: "
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
            f"trained with, optimizer and use_8bit_adam above all: {path.parent / CONFIG}."
        )


def _first_difference(here: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> str:
    """Of two adapters' weights, name -> shape, in words."""
    ranks = [{shape[0] for name, shape in shapes.items() if ".lora_A." in name} for shapes in (here, there)]
    if here.keys() == there.keys() and all(len(found) == 1 for found in ranks) and ranks[0] != ranks[1]:
        return f"rank {ranks[0].pop()} here, {ranks[1].pop()} there"
    for name in here:
        if name in there and there[name] != here[name]:
            return f"{name} is {here[name]} here and {there[name]} there"
    missing = [name for name in here if name not in there]
    if missing:
        return f"{len(missing)} of {len(here)} weights, the first {missing[0]}, are not in the checkpoint"
    others = [name for name in there if name not in here]
    return f"{len(others)} of its {len(there)} weights, the first {others[0]}, are not in this run"


def _warn_of_changes(run: Run, saved: Path) -> None:
    """A resumed run equals the uninterrupted one only under the same config."""
    if not saved.exists():
        return
    now: dict[str, Any] = parse_yaml(config_to_yaml(run.config))
    try:
        before: dict[str, Any] = parse_yaml(read_plain_text(saved)) or {}
    except PlainFileError as error:
        logger.warning("%s is damaged (%s): nothing says whether the config has changed.", saved, error)
        return
    changed = [name for name in now if name in before and before[name] != now[name] and name not in FREE_TO_CHANGE]
    for name in changed:
        logger.warning("Resumed with another %s: %s instead of %s.", name, now[name], before[name])


CONFIG = "config.yaml"
# What a run leaves besides checkpoints and the tracker's files.
RESULTS = (*PUBLISHED, RECORD_NAME, "scores.csv", VALIDATION, PROGRESS_PAGE)

# What a start leaves that ended before its first checkpoint: the next one writes all of it again.
BEGINNINGS = (CONFIG, METRICS_LOG, VALIDATION, PROGRESS_PAGE)


def claim_output_dir(output_dir: Path, resumed_from: Path | None, step: int, *, is_latest: bool) -> Path | None:
    """Leaves in the folder only what belongs to the run that starts or goes on now.

    Otherwise later checkpoints that this run has not made could pass for its `latest`, and an earlier run's curve,
    adapter or card for its own. A run that goes on from elsewhere takes the curve up to there along.

    Args:
        output_dir: of this run; it exists.
        resumed_from: the checkpoint that it goes on from; None for a start from scratch.
        is_latest: whether that is the newest usable checkpoint of the folder.

    Returns:
        The new folder `earlier-run-K` that holds what was moved; None if there was nothing.
    """
    goes_on_here = resumed_from is not None and resumed_from.parent.resolve() == output_dir.resolve()
    found = [path for number, path in checkpoint_folders(output_dir) if number > step or not goes_on_here]
    if goes_on_here and (is_latest or not found):
        return None
    results = [path for pattern in RESULTS for path in sorted(output_dir.glob(pattern))]
    if not found and resumed_from is None and all(path.name in BEGINNINGS for path in results):
        _remove(results)
        results = []
    found += results
    aside = _new_folder(output_dir) if found else None
    for path in found:
        assert aside is not None
        target = aside / path.relative_to(output_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        if goes_on_here and path.name in (CONFIG, METRICS_LOG):  # both courses need them
            shutil.copy2(path, target)
        else:
            os.rename(path, target)
    if resumed_from is not None and not goes_on_here and (resumed_from.parent / METRICS_LOG).is_file():
        with replacing_file(output_dir / METRICS_LOG) as copy:
            shutil.copyfile(resumed_from.parent / METRICS_LOG, copy)
    return aside


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _new_folder(output_dir: Path) -> Path:
    names = (output_dir / f"earlier-run-{number}" for number in itertools.count(1))
    folder = next(path for path in names if not path.exists())
    folder.mkdir()
    return folder


def capture_random_states(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, and of the CUDA device's if `device` is one.

    They repeat what libraries draw; our own draws have seeds of their own. The result holds only what
    `torch.load(weights_only=True)` reads.
    """
    python_version, python_words, python_gauss = random.getstate()
    of_numpy: Any = numpy.random.get_state(legacy=True)
    if of_numpy[0] != "MT19937":
        raise ValueError(f"NumPy's global generator must be MT19937 to be saved; got {of_numpy[0]}.")
    _, numpy_words, position, has_gauss, cached_gauss = of_numpy
    states = {
        "python": [python_version, list(python_words), python_gauss],
        "numpy": [numpy_words.tolist(), int(position), int(has_gauss), float(cached_gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.device(device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Puts the generators where `capture_random_states` found them.

    Raises:
        RandomStatesError: `device` is a CUDA device, but the states were captured without one.
    """
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda and "cuda" not in states:
        raise RandomStatesError(
            f"The saved random states have no CUDA generator, but this process runs on {device}: "
            "resume on the kind of device that the checkpoint was written on, or start a new run."
        )
    python_version, python_words, python_gauss = states["python"]
    random.setstate((python_version, tuple(python_words), python_gauss))
    numpy_words, position, has_gauss, cached_gauss = states["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(numpy_words, dtype=numpy.uint32), position, has_gauss, cached_gauss))
    # clones: torch crashes on a state that is a view into a larger tensor
    torch.set_rng_state(states["torch"].clone())
    if on_cuda:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)
