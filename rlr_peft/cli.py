"""The console script `rlr-peft`: picks a command and hands it the rest of the line."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from rlr_peft import __version__
from rlr_peft.foreign_text import guard_terminal, listed

# name -> (one line for --help, module with a function `NAME_command` of the remaining words that returns the exit code)
COMMANDS = {
    "train": ("Train an adapter on a reward (on several GPUs: accelerate launch -m rlr_peft.train).", "rlr_peft.train"),
    "config": (
        "Check a configuration and print it in full as YAML; --list names the recipes.",
        "rlr_peft.config.parsing",
    ),
    "plan": ("Add up the memory that a training needs, without weights or a GPU.", "rlr_peft.plan.command"),
    "diagnose": (
        "Measure every gradient estimator on your pipeline and reward, and say which to use.",
        "rlr_peft.diagnose.command",
    ),
    "compare": (
        "Compare base and adapters: tables, figures and a page of images side by side.",
        "rlr_peft.compare.command",
    ),
    "card": (
        "Write the model card of an output folder again, with a template or text of your own.",
        "rlr_peft.publishing.commands",
    ),
    "push": ("Publish an output folder, or a checkpoint's adapter, on the Hub.", "rlr_peft.publishing.commands"),
    "merge": ("Fuse an adapter into its base and save a full pipeline.", "rlr_peft.publishing.commands"),
    "export": ("Write an adapter as one file for ComfyUI and its kind.", "rlr_peft.publishing.commands"),
    "space": (
        "Write a Gradio page that shows base and adapter side by side, also as a Space of the Hub.",
        "rlr_peft.publishing.commands",
    ),
    "serve-reward": (
        "Serve a reward over HTTP, for --reward_fn http://HOST:PORT/.",
        "rlr_peft.serve_reward",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    Raises:
        SystemExit: 2 for a wrong command line or config, 1 for any other error that a message explains.
    """
    parser = argparse.ArgumentParser(
        prog="rlr-peft",
        usage="%(prog)s COMMAND [--name VALUE ...]",
        description="Train LoRA adapters of diffusers pipelines on rewards. `rlr-peft COMMAND --help` says more.",
        epilog="commands:\n" + "\n".join(f"  {name:<13} {line}" for name, (line, _) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rlr-peft {__version__}")
    guard_terminal()
    words = sys.argv[1:] if argv is None else argv
    if not words:
        parser.print_help(sys.stderr)
        return 2
    command, *rest = words
    if command in ("-h", "--help", "--help-all", "help", "--version"):
        parser.parse_args(["--version" if command == "--version" else "--help"])
    if command not in COMMANDS:
        from rlr_peft.config.knob import ConfigError
        from rlr_peft.config.parsing import exit_with

        near = [f"did you mean {name}?" for name in get_close_matches(command, COMMANDS, n=1)]
        advice = near[0] if near else "see rlr-peft --help."
        if command.startswith("-"):
            advice = f"write a command before it: rlr-peft train {command} ..."
        exit_with(ConfigError(f"command: expected {listed(COMMANDS, 'or')}, got {command}; {advice}"))
    from rlr_peft.build.reporting import reporting_errors, set_up_logging

    set_up_logging()
    _, module = COMMANDS[command]
    with reporting_errors():
        run: Callable[[Sequence[str]], int]
        run = getattr(importlib.import_module(module), f"{command.replace('-', '_')}_command")
        return run(rest)
