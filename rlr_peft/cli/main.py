"""The console script `rlr-peft`: picks a command and hands it the rest of the line."""

import argparse
import sys
from collections.abc import Callable, Sequence

from rlr_peft import __version__
from rlr_peft.cli.card_command import card_command
from rlr_peft.cli.compare_command import compare_command
from rlr_peft.cli.config_command import config_command
from rlr_peft.cli.diagnose_command import diagnose_command
from rlr_peft.cli.merge_command import merge_command
from rlr_peft.cli.plan_command import plan_command
from rlr_peft.cli.push_command import push_command
from rlr_peft.cli.serve_reward_command import serve_reward_command
from rlr_peft.foreign_text import guard_terminal

# name -> (one line for --help, function of the remaining words that returns the exit code)
COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "card": ("write a run's model card again, with a template or text of your own", card_command),
    "compare": ("base against adapters: tables, figures and a page of images side by side", compare_command),
    "config": ("check a configuration and print it in full as YAML", config_command),
    "diagnose": (
        "measure every gradient estimator on your pipeline and reward, and say which to use",
        diagnose_command,
    ),
    "merge": ("fuse an adapter into its base and save a full pipeline", merge_command),
    "plan": ("add up the GPU memory that a training config needs, without weights or a GPU", plan_command),
    "push": ("publish an output folder, or a checkpoint's adapter, on the Hub", push_command),
    "serve-reward": ("serve a reward over HTTP, for --reward_fn http://HOST:PORT/", serve_reward_command),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (2 for a wrong command line; without a command, the help)."""
    parser = argparse.ArgumentParser(
        prog="rlr-peft",
        description="Reward fine-tuning of LoRA adapters of diffusers pipelines. Training: train_rlr_lora.py.",
        epilog="commands:\n" + "\n".join(f"  {name:<13} {line}" for name, (line, _) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rlr-peft {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="the command's own flags (try --help)")
    guard_terminal()
    words = sys.argv[1:] if argv is None else argv
    if not words:
        parser.print_help(sys.stderr)
        return 2
    parsed = parser.parse_args(words)
    _, run = COMMANDS[parsed.command]
    return run(parsed.words)
