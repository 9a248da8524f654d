"""Training from Python: with a pipeline object, a function and a list of prompts, or with what a config names."""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from rlr_peft.build.folder_lock import only_writer
from rlr_peft.build.run import build_run
from rlr_peft.compare.evaluation import Evaluation, flat_metrics, paired_gains
from rlr_peft.config import Config as RunConfig
from rlr_peft.config import ConfigError, config_from_dict
from rlr_peft.durable_files import why_no_place
from rlr_peft.estimators.base import Estimator
from rlr_peft.prompt import Prompt
from rlr_peft.publishing.uploads import published_files
from rlr_peft.training.finishing import finish, summary
from rlr_peft.training.progress import Progress
from rlr_peft.training.resuming import resume
from rlr_peft.training.trackers import start_trackers
from rlr_peft.training.trainer import train
from rlr_peft.training.validation import evaluate_adapter, evaluate_base

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
