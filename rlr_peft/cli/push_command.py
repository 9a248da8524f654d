"""`rlr-peft push`: publishes what a run left, later or elsewhere."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from rlr_peft.config.parsing import parse_or_exit
from rlr_peft.config.yaml_files import problem_in_yaml
from rlr_peft.errors import UserError

PROG = "rlr-peft push"


def push_command(words: Sequence[str]) -> int:
    """Checks access, uploads the folder's published files in one commit and downloads the adapter to compare it."""
    arguments = parse_or_exit(_parser(), words)

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
            arguments.hub_model_id or _text_of(config, "hub_model_id", folder) or folder.resolve().name,
            token=arguments.hub_token,
            private=arguments.hub_private_repo or bool(config.get("hub_private_repo")),
            revision=arguments.hub_revision or _text_of(config, "hub_revision", folder),
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
        config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return dict(config)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({problem_in_yaml(error)}); mend or remove it.") from None


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
