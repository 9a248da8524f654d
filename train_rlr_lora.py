"""Fine-tunes LoRA weights of a diffusers pipeline on a reward: parse, build, resume, measure, train, finish, publish.

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
        from rlr_peft.build.run import build_run
        from rlr_peft.training.finishing import finish, summary
        from rlr_peft.training.resuming import resume
        from rlr_peft.training.trainer import train
        from rlr_peft.training.validation import evaluate_base

        run = build_run(config)
        progress = resume(run)
        base = evaluate_base(run)
        progress = train(run, progress, publisher.push_checkpoint if publisher else None)
        if not progress.interrupted_by and run.accelerator.is_main_process:
            say(summary(run, finish(run, progress, base)))
            if publisher is not None:
                say(publisher.finish(run.output_dir))
        run.processes.close()
        run.accelerator.end_training()
    if progress.interrupted_by and run.accelerator.is_main_process:
        say(f"Interrupted after step {progress.step}: go on with --resume_from_checkpoint latest.", sys.stderr)
    return progress.interrupted_by


if __name__ == "__main__":
    sys.exit(main())
