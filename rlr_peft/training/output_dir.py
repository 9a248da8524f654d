"""What another course of training left in the output folder is neither lost nor taken for this one's."""

import itertools
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from rlr_peft.durable_files import replacing_file
from rlr_peft.publishing.record import RECORD_NAME
from rlr_peft.publishing.uploads import PUBLISHED
from rlr_peft.training.checkpoints import checkpoint_folders
from rlr_peft.training.tracking import METRICS_LOG

CONFIG = "config.yaml"
# What a run leaves besides checkpoints and the tracker's files.
RESULTS = (*PUBLISHED, RECORD_NAME, "scores.csv", "validation")

# What a start leaves that ended before its first checkpoint: the next one writes all of it again.
BEGINNINGS = (CONFIG, METRICS_LOG, "validation")


def claim_output_dir(output_dir: Path, resumed_from: Path | None, step: int, *, is_latest: bool) -> Path | None:
    """Leaves in the folder only what belongs to the run that starts or goes on now.

    Otherwise later checkpoints that this run has not made could pass for its `latest`, and an earlier run's curve,
    adapter or card for its own. A run that goes on from elsewhere takes the curve up to there along.

    Args:
        output_dir: of this run; it exists.
        resumed_from: the checkpoint that it goes on from; None for a start from scratch.
        step: finished steps.
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
