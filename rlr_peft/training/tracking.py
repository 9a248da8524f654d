"""`metrics.jsonl`: one line of numbers for every step, the same file whether or not the run was interrupted."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rlr_peft.durable_files import flush_to_disk, replacing_file
from rlr_peft.errors import UserError

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
            step: finished optimiser steps.

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
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise MetricsError(
            f"The metric {name!r} of step {step} is {value}; expected a finite number. "
            "Something upstream diverged: look at the rewards and gradient norms of this step."
        )
    return value
