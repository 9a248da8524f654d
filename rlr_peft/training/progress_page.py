"""`progress.html`: one page that shows how a run goes, written again and again while it trains.

It needs no server: the browser loads the file anew. Curves are inside, images are links to the run's own files.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rlr_peft.build.run import Run
from rlr_peft.foreign_text import inside_script, page_environment, shown_name
from rlr_peft.reports import duration, write_text
from rlr_peft.training.progress import Progress

logger = logging.getLogger(__name__)

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
