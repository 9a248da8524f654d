"""Training from Python, with objects or with what a config names; and its loop: updates, records, images, checkpoints,
and an orderly end whatever comes.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.build.folder_lock import only_writer
from rlr_peft.build.machine import peak_memory_mb
from rlr_peft.build.reporting import GracefulInterruption
from rlr_peft.build.run import Run, build_run
from rlr_peft.compare.evaluation import Evaluation, flat_metrics, paired_gains
from rlr_peft.config import Config as RunConfig
from rlr_peft.config import ConfigError, config_from_dict, save_config
from rlr_peft.estimators.base import Estimator
from rlr_peft.files import why_no_place
from rlr_peft.prompt import Prompt
from rlr_peft.publishing.uploads import published_files
from rlr_peft.training.checkpoints import CheckpointManager
from rlr_peft.training.finishing import finish, summary
from rlr_peft.training.progress import Progress, is_due_after
from rlr_peft.training.resuming import CONFIG, claim_output_dir, open_checkpoints, resume, save_checkpoint
from rlr_peft.training.tracking import MetricsError, RunLog, start_trackers
from rlr_peft.training.update import Update, calibrate, calibration_due, take_update
from rlr_peft.training.validation import evaluate_adapter, evaluate_base, save_validation_images

logger = logging.getLogger(__name__)

AS_OBJECT = "given as an object"
SOME_PROMPTS = "simple-animals"  # for the config's own checks, which ask for prompts


def Config(**values: Any) -> RunConfig:  # noqa: N802
    """The checked configuration of a run, by the names of the flags: ``Config(max_train_steps=20, rank=8)``.

    The base, the reward and the prompts may be left to the `Trainer`, which then gets them as objects.

    Raises:
        ConfigError: an unknown name, a value out of range, or a combination that cannot be run.
    """
    objects = {"pretrained_model_name_or_path": AS_OBJECT, "reward_fn": AS_OBJECT}
    if "dataset_name" in values or "prompt_path" in values:
        return config_from_dict(objects | values)
    config = config_from_dict(objects | {"prompt_path": SOME_PROMPTS} | values)
    return replace(config, prompts=replace(config.prompts, prompt_path=AS_OBJECT))


class Trainer:
    """One training run, step by step. Of a run with several processes each must make all calls. ::

        trainer = rlr_peft.Trainer(
            pipeline, reward=sharpness, prompts=["a cat", "a dog"], config=rlr_peft.Config(max_train_steps=20)
        )
        trainer.train()
        trainer.evaluate()
        trainer.save("outputs/sharp")

    Args:
        pipeline: the loaded base, which gets the adapter; None loads what the config names.
        reward: a function ``(images (B, 3, H, W) in [0, 1], prompts) -> (B,)`` or a `Reward`; None for the config's.
        prompts: texts, or dictionaries with a text and more; None reads what the config names.
        estimator: one of your own, in place of the config's.
        config: from `Config`, or from `load_config` for flags and YAML.
        locks_folder: whether other programs are kept out of the output folder; False where the caller does that.

    Attributes:
        run: the parts of the run: its chain, estimator, reward, optimiser.
        progress: how far it has come; None before ``train``.

    Raises:
        ConfigError, PromptError, RewardError: what was given cannot be trained; the message says why.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline | None = None,
        reward: Callable[..., Any] | None = None,
        prompts: Iterable[Prompt | str | Mapping[str, Any]] | None = None,
        estimator: Estimator | None = None,
        *,
        config: RunConfig,
        locks_folder: bool = True,
    ) -> None:
        if not isinstance(config, RunConfig):
            raise ConfigError(f"config: expected rlr_peft.Config(...), got {type(config).__name__}.")
        named = {
            "pipeline": (pipeline, config.model.pretrained_model_name_or_path, "pretrained_model_name_or_path"),
            "reward": (reward, config.reward.reward_fn, "reward_fn"),
            "prompts": (prompts, config.prompts.prompt_path, "prompt_path"),
        }
        for part, (given, name, knob) in named.items():
            if given is None and name == AS_OBJECT:
                raise ConfigError(f"{part}: expected an object for the Trainer, or {knob} in the config, got neither.")
        self.run = build_run(config, pipeline, reward, prompts, estimator)
        self.progress: Progress | None = None
        self._locks_folder = locks_folder
        self._base: Evaluation | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one process of the run that writes and speaks."""
        return bool(self.run.accelerator.is_main_process)

    def train(self, publish_checkpoint: Callable[[Path], None] | None = None) -> Progress:
        """Trains to the last step, or to a signal after a checkpoint; goes on where the config says to resume.

        Args:
            publish_checkpoint: given the folder of every checkpoint that the config says to publish; must not wait.

        Returns:
            How far it came.

        Raises:
            FolderInUseError: another program writes to the output folder.
        """
        with self._only_writer():
            progress = resume(self.run)
            start_trackers(self.run)
            started = time.monotonic()
            self._base = evaluate_base(self.run)
            progress.evaluation_seconds = time.monotonic() - started
            self.progress = train(self.run, progress, publish_checkpoint)
        return self.progress

    def evaluate(self) -> dict[str, float]:
        """Base against adapter on the same prompts and seeds: `reward_before`, `reward_after`, `reward_gain`, ...

        Raises:
            ConfigError: there are no prompts to evaluate on.
        """
        before = self._base or evaluate_base(self.run)
        with self.run.averaged():
            after = evaluate_adapter(self.run)
        if before is None or after is None:
            raise ConfigError(
                "evaluate: expected prompts to evaluate on, got none; set evaluation_prompt_path or "
                "validation_split_percentage in the config."
            )
        return flat_metrics(paired_gains(before, after))

    def save(self, folder: str | Path | None = None) -> dict[str, float]:
        """Saves the adapter, proves that it reloads, measures it, and writes numbers, figures and the card.

        Args:
            folder: gets a copy of what is published of a run; None leaves it in the run's own folder alone.

        Returns:
            The contents of ``metrics.json``.

        Raises:
            ConfigError: nothing has been trained yet, or the folder cannot be made.
            AdapterMismatchError: the saved adapter does not reproduce the trained one.
        """
        if folder is not None and (reason := why_no_place(Path(folder))):
            raise ConfigError(
                f"save: expected a folder or a place for one, got {folder}, where {reason}; choose another."
            )
        if self.progress is None:
            raise ConfigError("save: expected a trained adapter, got none; call train() first.")
        with self._only_writer():
            metrics = finish(self.run, self.progress, self._base)
        if self.is_main_process and folder is not None and Path(folder).resolve() != self.run.output_dir.resolve():
            for name, path in published_files(self.run.output_dir).items():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, Path(folder) / name)
        return metrics

    def _only_writer(self) -> AbstractContextManager[None]:
        return only_writer(self.run.output_dir) if self._locks_folder else nullcontext()

    def summary(self, metrics: dict[str, float]) -> str:
        """What ``save`` measured, in words."""
        return summary(self.run, metrics)

    def close(self) -> None:
        """Ends the exchange between processes and the trackers."""
        self.run.processes.close()
        self.run.accelerator.end_training()


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
    started, evaluated = time.monotonic(), run.denoiser_evaluations
    yield
    progress.seconds += time.monotonic() - started
    count = torch.tensor(run.denoiser_evaluations - evaluated, device=run.accelerator.device)
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
