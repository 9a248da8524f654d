"""The trackers of a run, by accelerate: what they are told, and what they must not see."""

import sys
from typing import Any

import numpy
from accelerate.tracking import GeneralTracker

from rlr_peft.build.run import Run
from rlr_peft.config import Config, config_to_dict
from rlr_peft.errors import UserError
from rlr_peft.extras import extra
from rlr_peft.foreign_text import printable
from rlr_peft.redaction import redacted, secrets_of_command


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
