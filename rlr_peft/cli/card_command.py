"""`rlr-peft card`: writes a run's model card again, with a template or text of the user's own."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser

from rlr_peft.config.parsing import parse_or_exit
from rlr_peft.errors import UserError
from rlr_peft.foreign_text import say

PROG = "rlr-peft card"


def card_command(words: Sequence[str]) -> int:
    """Renders `README.md` from `run_record.json`; template and extra text are remembered there."""
    arguments = parse_or_exit(_parser(), words)

    from rlr_peft.build.folder_lock import only_writer
    from rlr_peft.publishing.card import write_card
    from rlr_peft.publishing.record import load_stored_card

    folder = Path(arguments.folder)
    try:
        card = load_stored_card(folder)
        if arguments.template is not None:
            card = replace(card, template=_text(arguments.template))
        if arguments.extra_text is not None:
            card = replace(card, extra_text=_text(arguments.extra_text))
        if arguments.plain:
            card = replace(card, template=None, extra_text=None)
        with only_writer(folder):
            say(write_card(folder, card))
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 1
    return 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Expected a text file, got {path} ({error}); check the path.") from error


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROG, description="Writes the model card of an output folder again, from its records.")
    parser.add_argument("folder", type=str, metavar="DIR", help="an output folder of train_rlr_lora.py")
    parser.add_argument(
        "--template",
        type=str | None,
        metavar="FILE",
        help="Jinja2 template in place of the shipped one; it gets the variables of model_card_template.md",
    )
    parser.add_argument(
        "--extra_text", type=str | None, metavar="FILE", help="Markdown that is put after the introduction"
    )
    parser.add_argument(
        "--plain", type=bool, default=False, nargs="?", const=True, help="forget earlier template and extra text"
    )
    return parser
