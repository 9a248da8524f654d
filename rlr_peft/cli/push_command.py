"""`rlr-peft push`: publishes what a run left, later or elsewhere."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from rlr_peft.config import ConfigError
from rlr_peft.config.found import read_found_config
from rlr_peft.config.parsing import parse_or_exit
from rlr_peft.errors import UserError
from rlr_peft.foreign_text import say

PROG = "rlr-peft push"


def push_command(words: Sequence[str]) -> int:
    """Checks access, uploads the folder's published files in one commit and downloads the adapter to compare it."""
    arguments = parse_or_exit(_parser(), words)

    from rlr_peft.build.reporting import set_up_logging

    set_up_logging()

    from rlr_peft.publishing.hub_client import open_destination
    from rlr_peft.publishing.publisher import publish
    from rlr_peft.publishing.uploads import published_files

    folder = Path(arguments.folder)
    try:
        config = _config(folder)
        published_files(folder)  # a wrong path is refused before a repository is made
        if arguments.hub_model_id is None and "hub_model_id" in config:
            say(f"Publishing on {config['hub_model_id']}, as {folder / 'config.yaml'} says.")
        destination = open_destination(
            arguments.hub_model_id or _text_of(config, "hub_model_id", folder) or folder.resolve().name,
            token=arguments.hub_token,
            private=arguments.hub_private_repo or bool(config.get("hub_private_repo")),
            revision=arguments.hub_revision or _text_of(config, "hub_revision", folder),
        )
        say(publish(folder, destination))
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 1
    return 0


def _config(folder: Path) -> dict[str, Any]:
    """The run's own names of the repository, which are the defaults; all else of its configuration is passed over."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return read_found_config(path, ("hub_model_id", "hub_private_repo", "hub_revision"))[0]
    except ConfigError as error:
        raise UserError(f"{path} is damaged ({str(error).removeprefix(f'--config {path}: ')}); mend it.") from error


def _text_of(config: dict[str, Any], name: str, folder: Path) -> str | None:
    value = config.get(name)
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise UserError(
            f"{folder / 'config.yaml'}: {name}: expected a text, got {value!r}; mend it there, or give --{name}."
        )
    return value


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
