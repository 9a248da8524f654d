"""`rlr-peft push`: publishes what a run left, later or elsewhere."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from rlr_peft.errors import UserError
from rlr_peft.plain_files import PlainFileError, parse_yaml, read_plain_text

PROG = "rlr-peft push"


def push_command(words: Sequence[str]) -> int:
    """Checks access, uploads the folder's published files in one commit and downloads the adapter to compare it."""
    arguments = _parser().parse_args(list(words))

    from rlr_peft.training.logs import set_up_logging

    set_up_logging()

    from rlr_peft.publishing.hub_access import open_destination
    from rlr_peft.publishing.hub_files import published_files
    from rlr_peft.publishing.publisher import publish

    folder = Path(arguments.folder)
    try:
        config = _config(folder)
        published_files(folder)  # a wrong path is refused before a repository is made
        destination = open_destination(
            arguments.hub_model_id or config.get("hub_model_id") or folder.resolve().name,
            token=arguments.hub_token,
            private=arguments.hub_private_repo or bool(config.get("hub_private_repo")),
            revision=arguments.hub_revision or config.get("hub_revision"),
        )
        print(publish(folder, destination))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _config(folder: Path) -> dict[str, Any]:
    """The run's own configuration, whose names of the repository are the defaults."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = parse_yaml(read_plain_text(path))
    except PlainFileError as error:
        raise UserError(f"{path} is damaged ({error}); mend or remove it.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged (expected lines of `name: value`); mend or remove it.")
    return config


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=PROG,
        description="Publishes an output folder, or a checkpoint's adapter, on the Hub.",
    )
    parser.add_argument("folder", type=str, metavar="DIR", help="an output folder of train_rlr_lora.py")

    def flag(name: str, type_: Any, help_: str, **options: Any) -> None:
        parser.add_argument(f"--{name}", type=type_, help=help_, **options)

    flag("hub_model_id", str | None, "`owner/name` or `name`; null means that of config.yaml, or the folder's name")
    flag("hub_token", str | None, "access token with the right to write; null takes HF_TOKEN or `hf auth login`")
    flag("hub_private_repo", bool, "make a private repository", default=False, nargs="?", const=True)
    flag("hub_revision", str | None, "branch to publish on, made when missing; null means that of config.yaml, or main")
    return parser
