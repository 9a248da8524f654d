"""Trains a LoRA adapter on a reward: `rlr-peft train`, `accelerate launch -m rlr_peft.train`, `train_rlr_lora.py`.

These are the calls of `docs/python.md` on a parsed config.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlr_peft.build.reporting import (
    AFTER_TRAINING,
    refuse_missing_rewards,
    reporting_errors,
    set_up_logging,
    work_offline_without_hub,
)
from rlr_peft.config import Config, ConfigError
from rlr_peft.config.arguments import knobs
from rlr_peft.config.knob import Group, knob
from rlr_peft.config.parsing import DESCRIPTION, EXAMPLE, exit_with, read_words
from rlr_peft.foreign_text import guard_terminal, say
from rlr_peft.rewards.names import refuse_unknown


@dataclass(frozen=True)
class TrainFlags(Group):
    """Trying first: a run that leaves nothing"""

    dry_run: bool = knob(
        False,
        "Do everything but train: load, plan the memory, take two updates, say what the whole run takes, and stop; no "
        "output folder is left.",
    )


def main() -> int:
    """The program: what its own command line asks for; returns the exit code."""
    guard_terminal()
    return train_command(sys.argv[1:], prog=None)


def train_command(words: Sequence[str], prog: str | None = "rlr-peft train") -> int:
    """Trains, evaluates, saves and publishes what the words ask for; returns the exit code."""
    try:
        said = read_words(words, TrainFlags, prog, DESCRIPTION, list(knobs()), example=EXAMPLE)
        config = said.config()
        refuse_unknown(config.reward.specs)
    except ConfigError as error:
        exit_with(error)

    set_up_logging()
    if not config.hub.push_to_hub:  # what is published is tried again and again
        work_offline_without_hub()
    with reporting_errors():
        refuse_missing_rewards(config)
    if said.own.dry_run:
        return dry_run_command(config)

    from rlr_peft.build.folder_lock import only_writer
    from rlr_peft.build.processes import stopping_with_launcher
    from rlr_peft.publishing.publisher import open_publisher

    output_dir = Path(config.training.output_dir)
    with (
        reporting_errors(AFTER_TRAINING),
        stopping_with_launcher(),
        only_writer(output_dir),
        open_publisher(config) as publisher,
    ):
        # Only now the heavy imports: a wrong flag or token is refused at once.
        from rlr_peft.training.trainer import Trainer

        trainer = Trainer(config=config, locks_folder=False)  # it is locked above
        progress = trainer.train(publisher.push_checkpoint if publisher else None)
        if not progress.interrupted_by:
            metrics = trainer.save()
            if trainer.is_main_process:
                say(trainer.summary(metrics))
                if publisher is not None:
                    say(publisher.finish(output_dir))
        trainer.close()
    if progress.interrupted_by and trainer.is_main_process:
        say(f"Interrupted after step {progress.step}: go on with --resume_from_checkpoint latest.", sys.stderr)
    return progress.interrupted_by


def dry_run_command(config: Config) -> int:
    """Prints what a dry run finds out."""
    with reporting_errors():
        from rlr_peft.training.dry_run import take_dry_run

        text = take_dry_run(config)
    if os.environ.get("RANK", "0") == "0":
        say(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
