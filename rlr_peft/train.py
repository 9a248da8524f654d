"""Trains a LoRA adapter on a reward: `rlr-peft train`, `accelerate launch -m rlr_peft.train`, `train_rlr_lora.py`.

These are the calls of `docs/python.md` on a parsed config.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rlr_peft.build.offline import work_offline_without_hub
from rlr_peft.build.reporting import set_up_logging
from rlr_peft.config import load_config_or_exit
from rlr_peft.foreign_text import guard_terminal, say


def main() -> int:
    """The program: what its own command line asks for; returns the exit code."""
    guard_terminal()
    return train_command(sys.argv[1:], prog=None)


def train_command(words: Sequence[str], prog: str | None = "rlr-peft train") -> int:
    """Trains, evaluates, saves and publishes what the words ask for; returns the exit code."""
    config = load_config_or_exit(words, prog)

    set_up_logging()
    if not config.hub.push_to_hub:  # what is published is tried again and again
        work_offline_without_hub()

    from rlr_peft.build.folder_lock import only_writer
    from rlr_peft.build.reporting import AFTER_TRAINING, reporting_errors
    from rlr_peft.publishing.publisher import open_publisher
    from rlr_peft.training.interruption import stopping_with_launcher

    output_dir = Path(config.training.output_dir)
    with (
        reporting_errors(AFTER_TRAINING),
        stopping_with_launcher(),
        only_writer(output_dir),
        open_publisher(config) as publisher,
    ):
        # Only now the heavy imports: a wrong flag or token is refused at once.
        from rlr_peft.training.api import Trainer

        trainer = Trainer(config=config, locks_folder=False)  # it is locked above
        progress = trainer.train(publisher.push_checkpoint if publisher else None)
        if not progress.interrupted_by and trainer.is_main_process:
            say(trainer.summary(trainer.save()))
            if publisher is not None:
                say(publisher.finish(output_dir))
        trainer.close()
    if progress.interrupted_by and trainer.is_main_process:
        say(f"Interrupted after step {progress.step}: go on with --resume_from_checkpoint latest.", sys.stderr)
    return progress.interrupted_by


if __name__ == "__main__":
    sys.exit(main())
