"""How far a run has come, whether it should stop, whether its updates teach anything, and the page that shows it.

It stops where its held-out reward falls, or it leaves the base behind; a reward that is constant, or too faint for the
optimiser, is said to be. `progress.html` is written again and again while a run trains, and needs no server: the
browser loads the file anew. Curves are inside, images are links to the run's own files.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from rlr_peft.build.run import Run
from rlr_peft.foreign_text import inside_script, page_environment, shown_name
from rlr_peft.reports import duration, write_text

# A window must fall this many standard errors below the best one. The best is the best of many by chance too, and every
# window is a test: with windows of 5 updates or more, noise alone stops about 1 % of the runs of 50 windows.
SIGNIFICANT = 4.5
KL_WINDOW = 10


@dataclass(frozen=True)
class Stop:
    """The decision to end training.

    Attributes:
        sentence: why, in one sentence.
        weights: what to go back to; None to keep the present weights.
    """

    sentence: str
    weights: list[torch.Tensor] | None = None


class EarlyStopping:
    """Watches the held-out reward in windows of updates, and the divergence from the base.

    Args:
        window: updates per window of the held-out reward; None does not watch it.
        kl_limit: nats that the mean of the last ten measured divergences must not pass; None does not watch them.
    """

    def __init__(self, window: int | None, kl_limit: float | None) -> None:
        self.window = window
        self.kl_limit = kl_limit
        self._best_weights: list[torch.Tensor] | None = None
        self._best: tuple[int, float] | None = None  # last update, mean
        self._variances: list[float] = []  # within each window so far
        self._heldout: list[float] = []
        self._kl: list[float] = []

    def check(self, step: int, heldout: float | None, kl: float | None, weights: Sequence[torch.Tensor]) -> Stop | None:
        """Takes the numbers of a finished update; returns the decision to stop, or None.

        Args:
            heldout: mean held-out reward of the update's samples.
            kl: mean divergence of the update's samples in nats, if it was measured.
        """
        return self._check_heldout(step, heldout, weights) or self._check_kl(step, kl)

    def _check_heldout(self, step: int, heldout: float | None, weights: Sequence[torch.Tensor]) -> Stop | None:
        if self.window is None or heldout is None:
            return None
        self._heldout.append(heldout)
        if len(self._heldout) < self.window:
            return None
        values = torch.tensor(self._heldout, dtype=torch.float64)
        mean = float(values.mean())
        self._heldout = []
        self._variances.append(float(values.var()))
        if self._best is None or mean > self._best[1]:
            self._best = (step, mean)
            self._best_weights = [weight.detach().clone() for weight in weights]
            return None
        best_step, best_mean = self._best
        # Pooled over all windows: a short one alone tells too little of its own variance.
        variance = sum(self._variances) / len(self._variances)
        if best_mean - mean > SIGNIFICANT * (2 * variance / self.window) ** 0.5:
            return Stop(
                f"Stopped at update {step} because the held-out reward fell from {best_mean:.4g} (updates up to "
                f"{best_step}) to {mean:.4g}; the weights are those of update {best_step}.",
                self._best_weights,
            )
        return None

    def _check_kl(self, step: int, kl: float | None) -> Stop | None:
        if self.kl_limit is None or kl is None:
            return None
        self._kl = [*self._kl, kl][-KL_WINDOW:]
        mean = sum(self._kl) / len(self._kl)
        if len(self._kl) == KL_WINDOW and mean > self.kl_limit:
            return Stop(
                f"Stopped at update {step} because the divergence from the base, {mean:.4g} nats, passed the limit of "
                f"{self.kl_limit:g}."
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """All numbers that still count."""
        return {
            "best_weights": self._best_weights,
            "best": self._best,
            "variances": self._variances,
            "heldout": self._heldout,
            "kl": self._kl,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._best_weights = state["best_weights"]
        self._best = None if state["best"] is None else tuple(state["best"])
        self._variances, self._heldout = list(state["variances"]), list(state["heldout"])
        self._kl = list(state["kl"])


@dataclass
class Progress:
    """How far a run has come, over all its sessions.

    Attributes:
        step: finished updates.
        seconds: time spent training.
        denoiser_evaluations: of all processes, for training.
        peak_memory_mb: peak memory of the main process, in MB (2**20 bytes).
        coverage: what the estimator's last update covered, in words.
        stopped_early: why training was stopped before its last step, in one sentence; empty if it was not.
        interrupted_by: exit code of the signal that ended this session early; 0 for none.
        resumed_from: the checkpoint that this session goes on from; None for a start from scratch.
        evaluation_seconds: what the base's evaluation took in this session.
        early_stopping: watches for reward hacking.
    """

    step: int = 0
    seconds: float = 0.0
    denoiser_evaluations: int = 0
    peak_memory_mb: float = 0.0
    coverage: str = ""
    stopped_early: str = ""
    interrupted_by: int = 0
    resumed_from: Path | None = None
    evaluation_seconds: float = 0.0
    early_stopping: EarlyStopping = field(default_factory=lambda: EarlyStopping(None, None))


def is_due_after(step: int, interval: int | None) -> bool:
    """Whether something that is done every `interval` updates is done after update `step`, the first being 1.

    Checkpoints, validation images, the divergence and publishing all count so. None is never.
    """
    return interval is not None and step % interval == 0


logger = logging.getLogger(__name__)

# The metric: share of the samples whose reward is at the limit or above.
SATISFIED = "reward_satisfied"
# Adam divides a gradient g by |g| + epsilon. Where g is this share of epsilon or less, its step is that share of the
# learning rate or less, instead of about 1.
FAINT = 0.01
FOR_FAINT_REWARDS = "multiply the reward by a constant, or have it scaled: --reward_fn '{NAME: 1}'"


class LearningSignal:
    """Says once when there is nothing to learn from an update.

    Args:
        adam_epsilon: of the optimiser; 0 for one whose step does not depend on the gradient's size.
    """

    def __init__(self, reward_name: str, num_parameters: int, adam_epsilon: float) -> None:
        self._reward_name = reward_name
        self._num_parameters = num_parameters
        self._epsilon = adam_epsilon
        self._has_warned = False

    @classmethod
    def of(cls, run: Run) -> "LearningSignal":
        """That of a run."""
        parameters = sum(parameter.numel() for parameter in run.chain.parameters)
        optimizer = run.config.optimizer
        has_epsilon = optimizer.optimizer in ("AdamW", "Prodigy")
        return cls(run.reward.name, parameters, optimizer.adam_epsilon if has_epsilon else 0.0)

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warns, the first time, if the update that ended with this step taught nothing.

        Args:
            step: from 1.
        """
        why = self._lack(metrics)
        if why is not None and not self._has_warned:
            logger.warning("Update %d taught nothing: %s.", step, why)
            self._has_warned = True

    def verdict(self, records: Sequence[Mapping[str, Any]]) -> str | None:
        """One sentence if no update of a run taught anything; None otherwise, or without updates."""
        lacks = [self._lack(record) for record in records]
        if not lacks or None in lacks:
            return None
        last = "" if len(set(lacks)) == 1 else "in the last, "
        return f"Nothing was learnt in {len(lacks)} updates: {last}{lacks[-1]}."

    def _lack(self, metrics: Mapping[str, float]) -> str | None:
        """Why an update teaches nothing, in words; None if it does."""
        if metrics.get(SATISFIED) == 1:
            return "all images have reached the --reward_limit"
        who, norm = f"reward '{self._reward_name}'", metrics["gradient_norm"]
        if norm == 0 and metrics["reward_se"] == 0:
            return (
                f"{who} scored all images the same ({metrics['reward']:g}), so no image is better than another "
                "(advantages are zero), and its gradient is zero"
            )
        if norm == 0:
            return (
                f"the gradient of {who} is zero: the images of each prompt scored the same, or it vanishes in float32; "
                f"all scores have a standard error of {metrics['reward_se']:.1g}: if that is little, "
                f"{FOR_FAINT_REWARDS}"
            )
        typical = norm / math.sqrt(self._num_parameters)
        if typical > FAINT * self._epsilon:
            return None
        return (
            f"the gradient of {who} is too faint, {typical:.0e} in a typical weight, against --adam_epsilon "
            f"{self._epsilon:g}, so that weights move by {typical / self._epsilon:.0e} of the learning rate; "
            f"{FOR_FAINT_REWARDS}"
        )


PROGRESS_PAGE = "progress.html"
VALIDATION = "validation"  # the folder of the images that are drawn while training
TEMPLATE = "progress.html.j2"
# More points than pixels say nothing more.
MOST_POINTS = 400
# Seconds: between two writes, and until a page without news says so, beside ten times what an update takes.
BETWEEN_WRITES, SILENT = 5.0, 120.0
CURVES = ("reward", "heldout", "kl")
# `trained`: all updates are done, and the final evaluation is not. `stopped`: an error, or Ctrl-C twice.
State = Literal["training", "trained", "stopped", "finished"]
Point = tuple[float, float, float]


class ProgressPage:
    """The page of one run; the main process writes it.

    Args:
        metrics: lines of its `metrics.jsonl` so far.
    """

    def __init__(self, run: Run, metrics: Iterable[Mapping[str, Any]]) -> None:
        self._run = run
        self._curves: dict[str, list[Point]] = {name: [] for name in CURVES}
        self._times: deque[float] = deque(maxlen=21)
        self._written = -math.inf
        for line in metrics:
            self._add(line["step"], line)

    def record(self, progress: Progress, metrics: Mapping[str, Any]) -> None:
        """Takes down a finished update, and writes the page unless it has just been written."""
        self._add(progress.step, metrics)
        self._times.append(time.monotonic())
        if self._times[-1] - self._written >= BETWEEN_WRITES:
            self.write(progress)

    def write(self, progress: Progress, state: State = "training") -> None:
        """Writes the page; one that cannot be written is told of, and training goes on without it."""
        self._written = time.monotonic()
        try:
            write_text(self._run.output_dir / PROGRESS_PAGE, self._html(progress, state))
        except OSError as error:
            logger.warning("%s cannot be written (%s): it shows an older state.", PROGRESS_PAGE, error)

    def _add(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, points in self._curves.items():
            if name in metrics:
                points.append((step, metrics[name], metrics.get(f"{name}_se", 0.0)))

    def _html(self, progress: Progress, state: State) -> str:
        run, last = self._run, self._run.arithmetic.max_train_steps
        each = self._seconds_per_update(progress)
        heldout = None if run.heldout is None else f"{run.heldout.name}, held out"
        names = {"reward": f"{run.reward.name}, training prompts", "heldout": heldout, "kl": "KL from the base, nats"}
        steps = validation_steps(run.output_dir / VALIDATION, progress.step)
        data = {
            "curves": [
                {"name": names[name], "points": thinned(points)} for name, points in self._curves.items() if points
            ],
            "frames": steps,
            "images": [image_files(run.output_dir, step) for step in steps],
            "written": time.time(),
            "silent": max(SILENT, 10 * each, 2 * progress.evaluation_seconds),
            "live": state in ("training", "trained"),
        }
        prompts = [p.text for p in run.validation_prompts for _ in range(run.config.validation.num_validation_images)]
        return (
            page_environment(Path(__file__).parent)
            .get_template(TEMPLATE)
            .render(
                title=f"{shown_name(run.config.model.pretrained_model_name_or_path)}, trained on {run.reward.name}",
                state=progress.stopped_early or self._state(progress, state),
                step=progress.step,
                last=last,
                share=100 * progress.step / last,
                left=self._left(progress, state, each),
                prompts=prompts if steps else [],
                facts=self._facts(progress, each),
                results=state == "finished",
                compared=state == "finished" and run.evaluation_prompts is not None,
                data=inside_script(data),
            )
        )

    def _seconds_per_update(self, progress: Progress) -> float:
        """Of late, with all that is done between two updates; else what updates alone have taken."""
        if len(self._times) > 1:
            return (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        return progress.seconds / progress.step if progress.step else 0.0

    def _state(self, progress: Progress, state: State) -> str:
        if progress.interrupted_by:
            return "Interrupted. Go on with --resume_from_checkpoint latest."
        return {
            "training": "Training." if progress.step else "Training: the first update is on its way.",
            "trained": "All updates are done: the adapter is being evaluated and proven to reload.",
            "stopped": "Stopped by an error or by hand. Go on with --resume_from_checkpoint latest.",
            "finished": "Finished.",
        }[state]

    def _left(self, progress: Progress, state: State, each: float) -> str:
        """Time left, in words; empty where nobody knows."""
        if state in ("stopped", "finished") or progress.interrupted_by or not progress.step:
            return ""
        updates = 0.0 if state == "trained" else each * (self._run.arithmetic.max_train_steps - progress.step)
        text = f"about {duration(updates + progress.evaluation_seconds)} left"
        if progress.evaluation_seconds:
            text += f", of which {duration(progress.evaluation_seconds)} for the final evaluation"
        return text

    def _rate(self) -> str:
        """The present one, and where the schedule has changed it the highest too."""
        now, highest = self._run.lr_scheduler.get_last_lr()[0], self._run.lr_scheduler.base_lrs[0]
        return f"{highest:.2g}" if now == highest else f"{now:.2g} now, {highest:.2g} at the most"

    def _facts(self, progress: Progress, each: float) -> dict[str, str]:
        run = self._run
        return {
            "method": f"{run.method}: {run.method_in_words}",
            "coverage": progress.coverage,
            "images per update": str(run.samples_per_update),
            "learning rate": self._rate(),
            "time per update": duration(each) if each else "",
            "denoiser evaluations": f"{progress.denoiser_evaluations:,}" if each else "",
            "peak memory": f"{progress.peak_memory_mb / 1024:.1f} GiB" if each else "",
        }


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """As many means of neighbours as can be seen; the error of a mean shrinks with them."""
    size = math.ceil(len(points) / most)
    parts = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [
        (
            round(fmean(step for step, _, _ in part), 1),
            fmean(mean for _, mean, _ in part),
            math.sqrt(math.fsum(error**2 for _, _, error in part)) / len(part),
        )
        for part in parts
    ]


def validation_steps(folder: Path, last: int) -> list[int]:
    """Updates after which images were drawn, up to the last; a resumed run may have later ones of an earlier course."""
    found = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(step) for step in found if step.isdecimal() and int(step) <= last)


def image_files(output_dir: Path, step: int) -> list[str]:
    """The images of one update as links from the page."""
    files = sorted((output_dir / VALIDATION / f"step-{step:06d}").glob("*.*"))
    return [path.relative_to(output_dir).as_posix() for path in files if path.suffix in (".png", ".webp")]
