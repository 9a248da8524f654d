"""Fine-tunes LoRA weights of a diffusers pipeline on a reward: the calls of `docs/python.md` on a parsed config.

accelerate launch train_rlr_lora.py --config configs/tiny_shapes.yaml
"""

import sys
from pathlib import Path

from rlr_peft.build.reporting import set_up_logging
from rlr_peft.config import load_config_or_exit
from rlr_peft.foreign_text import guard_terminal, say


def main() -> int:
    """Runs what the command line asks for; returns the exit code."""
    guard_terminal()
    config = load_config_or_exit(sys.argv[1:])

    set_up_logging()

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
