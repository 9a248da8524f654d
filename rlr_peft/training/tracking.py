"""What a run records while it trains: `metrics.jsonl`, the trackers, the progress bar and the messages.

`metrics.jsonl` has one line of numbers for every step, the same file whether or not the run was interrupted.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch
from accelerate.tracking import GeneralTracker
from tqdm.auto import tqdm

from rlr_peft.build.chain import stage_form
from rlr_peft.build.prompts import source_shares
from rlr_peft.build.run import Run
from rlr_peft.config import Config, config_to_dict, stages_from_config
from rlr_peft.config.chain import AUTO
from rlr_peft.errors import UserError, extra
from rlr_peft.files import flush_to_disk, replacing_file
from rlr_peft.foreign_text import printable
from rlr_peft.prompt import Prompt, Stages
from rlr_peft.redaction import redacted, secrets_of_command
from rlr_peft.training.progress import LearningSignal, Progress, ProgressPage
from rlr_peft.training.update import Update

logger = logging.getLogger(__name__)

METRICS_LOG = "metrics.jsonl"


class MetricsError(UserError, ValueError):
    """A number that is not finite, or a metrics file that cannot be read."""


class MetricsLog:
    """Appends lines to a file, one JSON object with a `step` on each.

    Log a step before saving its checkpoint, and call `synchronize` in between: then a run resumed from that checkpoint
    repeats exactly the lines that are dropped here, and its file equals that of a run that was never interrupted
    (as long as no line holds a time of day or a duration).

    Args:
        path: the file. Its folder is created when missing.
        resume_step: keep the lines up to this step, drop later ones and a last line that was cut off in writing.
            None starts a new, empty file.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        kept = []
        if resume_step is not None and self.path.exists():
            kept = [metrics for metrics in read_metrics(self.path) if metrics["step"] <= resume_step]
        with replacing_file(self.path) as aside:
            aside.write_text("".join(_line(metrics) for metrics in kept), encoding="utf-8")
        self._file = self.path.open("a+", encoding="utf-8")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Appends one line; it survives the end of this process however it comes.

        Args:
            metrics: name -> number, string, bool, None, list or dict; tensors and NumPy values of one element count as
                numbers.

        Raises:
            MetricsError: a number is NaN or infinite; nothing is written.
        """
        self._file.write(_line({"step": step, **{name: _plain(name, value, step) for name, value in metrics.items()}}))
        self._file.flush()

    def synchronize(self) -> None:
        """Waits until all lines are on the disk and would survive a power cut.

        Where somebody has removed or replaced the file in between, it is written anew, with all lines.

        Raises:
            OSError: it cannot be written.
        """
        self._restore()
        flush_to_disk(self.path)

    def _restore(self) -> None:
        if self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
            return
        self._file.seek(0)  # an open file lives on without its name
        lines = self._file.read()
        if self.path.exists():
            os.replace(self.path, self.path.with_name(f"{self.path.name}.replaced"))
        with replacing_file(self.path) as aside:
            aside.write_text(lines, encoding="utf-8")
        self._file.close()
        self._file = self.path.open("a+", encoding="utf-8")
        logger.warning("%s was removed while the run wrote to it: it is there again, with all lines.", self.path)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, oldest first; a last line that was cut off in writing is left out.

    Raises:
        MetricsError: another line is not a JSON object with a `step`.
    """
    *lines, _cut_off = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entry["step"] + 0
        except (ValueError, KeyError, TypeError) as error:
            raise MetricsError(
                f"{path}, line {number}: expected a JSON object with a number `step`, got {line[:80]!r} ({error}). "
                "Remove the line, or the file to lose the earlier metrics."
            ) from None
        metrics.append(entry)
    return metrics


def _line(metrics: Mapping[str, Any]) -> str:
    return json.dumps(metrics, allow_nan=False) + "\n"


def _plain(name: str, value: Any, step: int) -> Any:
    """JSON's own types, with every number checked."""
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", item, step) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{index}]", item, step) for index, item in enumerate(value)]
    if isinstance(value, (torch.Tensor, numpy.generic)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise MetricsError(
            f"The metric {name!r} of step {step} is {value}; expected a finite number. "
            "Something upstream diverged: look at the rewards and gradient norms of this step."
        )
    return value


class RunLog:
    """Records the updates of a run, as long as its context is open.

    Only the main process writes `metrics.jsonl` and speaks of updates that teach nothing.

    Args:
        progress: where it starts or goes on.
    """

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run = run
        self._resume_step = progress.step or None
        self._learning_signal = LearningSignal.of(run)
        self._stack = ExitStack()
        self._progress = progress
        self._lines: MetricsLog | None = None
        self._page: ProgressPage | None = None
        self.path = run.output_dir / METRICS_LOG
        start_trackers(run)
        _announce(run, progress)

    def __enter__(self) -> "RunLog":
        run, done, last_step = self._run, self._resume_step or 0, self._run.arithmetic.max_train_steps
        if run.accelerator.is_main_process:
            self._lines = self._stack.enter_context(MetricsLog(self.path, self._resume_step))
            self._page = ProgressPage(run, read_metrics(self.path))
            self._page.write(self._progress)
        if done >= last_step:
            logger.warning("Nothing is left to train: %d of %d updates are done.", done, last_step)
        is_hidden = not run.accelerator.is_local_main_process
        self._bar = self._stack.enter_context(tqdm(desc="Steps", initial=done, total=last_step, disable=is_hidden))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        if self._page is not None:
            self._page.write(self._progress, "stopped" if error is not None else "trained")

    def record(self, progress: Progress, update: Update) -> None:
        """Takes down a finished update.

        Raises:
            MetricsError: a number of it is not finite.
        """
        self._say_coverage(progress, update)
        metrics: dict[str, Any] = update.metrics() | {"denoiser_evaluations": progress.denoiser_evaluations}
        if self._lines is not None and self._page is not None:
            self._lines.log(metrics, progress.step)
            self._learning_signal.check(progress.step, metrics)
            self._page.record(progress, metrics)
        self._track(metrics | {"seconds": progress.seconds}, progress.step)
        self._bar.update()
        self._bar.set_postfix(reward=f"{metrics['reward']:.4f}", lr=f"{metrics['lr']:.2e}")

    def synchronize(self) -> None:
        """Waits until all lines are on the disk.

        Raises:
            OSError: they cannot be written.
        """
        if self._lines is not None:
            self._lines.synchronize()

    def _track(self, metrics: Mapping[str, Any], step: int) -> None:
        """Hands the numbers to the trackers, whose files may be removed by somebody: the run does not need them."""
        run = self._run
        folder = run.output_dir / run.config.logging.logging_dir / run.config.logging.tracker_name
        if run.config.logging.report_to == "tensorboard" and not folder.exists() and run.accelerator.trackers:
            folder.mkdir(parents=True)
            logger.warning("%s was removed while the run wrote to it: its curves begin anew.", folder)
        run.accelerator.log(dict(metrics), step=step)

    def _say_coverage(self, progress: Progress, update: Update) -> None:
        """Says what the estimate covers whenever that changes, and which score terms sit on hot steps."""
        coverage = update.coverage.describe()
        if coverage != progress.coverage:
            logger.log(logging.INFO if update.coverage.unbiased else logging.WARNING, "%s", coverage)
            if self._run.method == AUTO and not self._run.objective.has_gradient:
                logger.info("The reward has no gradient: %s is ram; --estimator rlr is unbiased, and slower.", AUTO)
            for t, ratio in update.books[0].hot_steps.items():
                logger.warning("The score term of step %d is noisy: |d mean / d output| / std is %.1f there.", t, ratio)
        progress.coverage = coverage


def _announce(run: Run, progress: Progress) -> None:
    training, processes = run.config.training, run.accelerator.num_processes
    trainable = sum(parameter.numel() for parameter in run.chain.parameters)
    stages = stages_from_config(run.config)
    chain_of_thought = [] if stages is None else [f"{form_in_words(run)} = {stages.describe(run.chain.num_steps)}"]
    is_measured = "; the accumulation steps are measured" if training.gradient_accumulation_steps == AUTO else ""
    for line in (
        "***** Running training *****",
        f"  Base = {run.config.model.pretrained_model_name_or_path}, reward = {run.reward.name}",
        f"  Trainable LoRA parameters = {trainable:,}",
        f"  Prompts = {len(run.prompts):,} ({_sources(run)})",
        f"  Images per update = {run.samples_per_update}, {run.num_images_per_prompt} of a prompt (train_batch_size "
        f"{training.train_batch_size} x gradient_accumulation_steps {run.gradient_accumulation_steps} x "
        f"{processes} process{'es' if processes > 1 else ''}{is_measured})",
        f"  Denoising steps = {run.chain.num_steps}, guidance scale = {run.chain.guidance_scale:g}",
        *(f"  Chain-of-Thought {line}" for line in chain_of_thought),
        *(f"    {line}" for line in stage_prompts_in_words(run)),
        f"  Optimization steps = {run.arithmetic.max_train_steps}, {progress.step} done",
        f"  Estimator = {run.method}: {run.method_in_words}",
    ):
        logger.info(line)


def _sources(run: Run) -> str:
    """Where the prompts come from, each source with its share of the samples: `75 % captions.parquet, 25 % scenes`."""
    shares = source_shares(run.config)
    if len(shares) > 1:
        return ", ".join(f"{100 * share:.3g} % {source}" for source, share in shares.items())
    return ("the first of the stream " if run.config.prompts.streaming else "") + "".join(shares)


def form_in_words(run: Run) -> str:
    """How stage prompts condition the steps: `as a contrast`."""
    return stage_form(run.config, run.pipeline).describe(run.prompts)


def stage_prompts_in_words(run: Run) -> list[str]:
    """What the Chain-of-Thought makes of the first prompts: `a cat on a beach -> coarse: a beach; fine: a cat`.

    Of a contrast the negative prompts: `... -> the whole prompt; negative prompts: coarse: a cat; fine: a beach`.
    """
    stages, lines = stages_from_config(run.config), []
    if stages is None:
        return []
    for prompt in run.prompts[:3]:
        conditions, away_from = stage_conditions(run, stages, prompt)
        texts, is_contrast = away_from or conditions, bool(away_from)
        parts = "; ".join(f"{name}: {text}" for name, text in zip(stages.names, texts, strict=True))
        if is_contrast:
            differ = len(set(texts)) > 1
            parts = f"the whole prompt; negative prompts: {parts}" if differ else "the whole prompt in every stage"
        lines.append(f"{prompt.text} -> {parts}")
    return lines


def stage_conditions(run: Run, stages: Stages, prompt: Prompt) -> tuple[list[str], list[str]]:
    """What conditions the stages of a prompt; and of a contrast, what guidance leads away from in them."""
    told = [run.chain.prompt_of_stage(prompt, index) for index in range(stages.count)]
    is_contrast = stage_form(run.config, run.pipeline).is_contrast(prompt)
    return [one.text for one in told], [one.negative_prompt or "nothing" for one in told] if is_contrast else []


class TrackerError(UserError, RuntimeError):
    """A tracker that does not start."""


def start_trackers(run: Run) -> None:
    """Starts those that the config names, unless they are there already; every process must call it.

    Raises:
        TrackerError: one of them does not start, as where nobody is logged in.
    """
    if run.accelerator.trackers:
        return
    logging, folder = run.config.logging, run.output_dir / run.config.logging.logging_dir
    # wandb and SwanLab send the command line along.
    sys.argv = [redacted(word, secrets_of_command(sys.argv)) for word in sys.argv]
    options: dict[str, Any] = {
        # The terminal's text and uncommitted code may hold anything.
        "wandb": {"dir": str(folder), "settings": {"console": "off", "disable_git": True}},
        "swanlab": {"log_dir": str(folder / "swanlab")},
        "trackio": {"embed": False},
    }
    if logging.report_to != "none":
        folder.mkdir(parents=True, exist_ok=True)  # wandb would take a temporary folder instead
    try:
        run.accelerator.init_trackers(logging.tracker_name, tracker_config(run.config), options)
    except Exception as error:  # each has errors of its own
        raise TrackerError(
            f"report_to: expected {logging.report_to} to start, got {type(error).__name__}: {error} Log in to it, "
            "set it to work offline (WANDB_MODE=offline, SWANLAB_MODE=offline), or take another --report_to."
        ) from error


def track_images(tracker: GeneralTracker, name: str, images: numpy.ndarray[Any, Any], step: int) -> None:
    """Hands over (N, H, W, 3) 8-bit images; the others that `all` finds get none, as each takes them in its own way."""
    if tracker.name == "tensorboard":
        tracker.log_images({name: images}, step=step, dataformats="NHWC")
    elif tracker.name in ("wandb", "swanlab"):
        tracker.log_images({name: list(images)}, step=step)
    elif tracker.name == "trackio":
        trackio = extra("trackio", "trackio", "--report_to trackio")
        tracker.log({f"{name}/{i}": trackio.Image(image) for i, image in enumerate(images)}, step=step)


def tracker_config(config: Config) -> dict[str, Any]:
    """Plain numbers and texts, without secrets: trackers may be public."""
    values = config_to_dict(config).items()
    return {name: value if isinstance(value, (bool, int, float)) else printable(str(value)) for name, value in values}
