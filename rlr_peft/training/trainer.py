"""The training loop: updates, records, images, checkpoints, and an orderly end whatever comes."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rlr_peft.build.machine import peak_memory_mb
from rlr_peft.build.run import Run
from rlr_peft.config import save_config
from rlr_peft.training.checkpoints import CheckpointManager
from rlr_peft.training.interruption import GracefulInterruption
from rlr_peft.training.progress import Progress, is_due_after
from rlr_peft.training.resuming import CONFIG, claim_output_dir, open_checkpoints, resume, save_checkpoint
from rlr_peft.training.tracking import MetricsError, RunLog
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
    config, last_step, checkpoints = run.config, run.arithmetic.max_train_steps, open_checkpoints(run)
    _claim_folder(run, progress)
    with GracefulInterruption() as interruption, RunLog(run, progress) as log:
        if progress.step == 0 and config.validation.validation_steps:
            _validate(run, progress)
        while progress.step < last_step and not progress.stopped_early:
            with _counting(run, progress), run.processes.doing(f"update {progress.step + 1}"):
                if calibration_due(run, progress.step):
                    calibrate(run, progress.step)
                update = take_update(run, progress.step)
            progress.step += 1
            log.record(progress, update)
            if is_due_after(progress.step, config.validation.validation_steps) and progress.step < last_step:
                _validate(run, progress)
            _stop_early(run, progress, update)
            is_last = progress.step == last_step or bool(progress.stopped_early)
            if is_last and run.rollback is not None and not progress.stopped_early:
                run.rollback.finish()
            # Any process may have got the signal; all must act on it at the same step.
            stop = run.processes.largest(interruption.exit_code, "the signals")
            publishes = publish_checkpoint is not None and is_due_after(progress.step, config.hub.push_every)
            if stop or is_last or publishes or is_due_after(progress.step, run.arithmetic.checkpointing_steps):
                path = _save(run, progress, checkpoints, log)
                if publish_checkpoint is not None and publishes:
                    publish_checkpoint(path)
            if stop and not is_last:  # after the last one what is left is the result, which a second signal ends
                progress.interrupted_by = stop
                break
    return progress


def _claim_folder(run: Run, progress: Progress) -> None:
    """Moves aside what another course of training left, and saves the config; on the main process only."""
    if not run.accelerator.is_main_process:
        return
    is_latest = run.config.checkpointing.resume_from_checkpoint == "latest"
    aside = claim_output_dir(run.output_dir, progress.resumed_from, progress.step, is_latest=is_latest)
    if aside is not None:
        logger.warning("The files of an earlier run in %s were moved to %s.", run.output_dir, aside)
    save_config(run.config, run.output_dir / CONFIG, run.given)


def _validate(run: Run, progress: Progress) -> None:
    with run.averaged():
        save_validation_images(run, progress.step, "validation")


@contextmanager
def _counting(run: Run, progress: Progress) -> Iterator[None]:
    """Adds what is done inside to the seconds, the denoiser evaluations of all processes and the peak memory."""
    started, evaluated = time.monotonic(), run.chain.denoiser_evaluations
    yield
    progress.seconds += time.monotonic() - started
    count = torch.tensor(run.chain.denoiser_evaluations - evaluated, device=run.accelerator.device)
    progress.denoiser_evaluations += int(run.processes.sum(count, "the denoiser evaluations"))
    progress.peak_memory_mb = max(progress.peak_memory_mb, peak_memory_mb(run.accelerator.device))


def _stop_early(run: Run, progress: Progress, update: Update) -> None:
    """Ends training where the early stopping says so, with the weights that it names."""
    heldout = None if update.heldout is None else float(update.heldout.mean())
    kl = None if update.kl is None else float(update.kl.mean())
    reason = progress.early_stopping.check(progress.step, heldout, kl, run.weights)
    if reason is None:
        return
    progress.stopped_early = reason.sentence
    logger.warning("%s", reason.sentence)
    if reason.weights is not None:
        with torch.no_grad():
            for weight, best in zip(run.weights, reason.weights, strict=True):
                weight.copy_(best)


def _save(run: Run, progress: Progress, checkpoints: CheckpointManager, log: RunLog) -> Path:
    """Saves a checkpoint, with the metrics' lines on the disk before it; those that cannot be are told of after it."""
    unwritten: OSError | None = None
    try:
        log.synchronize()
    except OSError as error:
        unwritten = error
    with run.processes.doing(f"saving checkpoint-{progress.step}"):
        path = save_checkpoint(run, progress, checkpoints)
    if run.accelerator.is_main_process and not (run.output_dir / CONFIG).exists():
        save_config(run.config, run.output_dir / CONFIG, run.given)
        logger.warning("%s was removed while the run wrote to it: it is there again.", run.output_dir / CONFIG)
    if unwritten is not None:
        raise MetricsError(
            f"{log.path} cannot be written ({unwritten}). {path} is complete: mend the cause and go on with "
            "--resume_from_checkpoint latest."
        ) from unwritten
    return path
