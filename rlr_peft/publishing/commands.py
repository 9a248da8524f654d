"""`rlr-peft card`, `push` and `merge`: a card is written again, a folder published later, an adapter fused in.

Model libraries are imported inside: a wrong flag is refused at once.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from rlr_peft.config import ConfigError
from rlr_peft.config.found import read_found_config
from rlr_peft.config.model import check_revision
from rlr_peft.config.parsing import exit_with, parse_or_exit
from rlr_peft.errors import UserError
from rlr_peft.foreign_text import say


def card_command(words: Sequence[str]) -> int:
    """Renders `README.md` from `run_record.json`; template and extra text are remembered there."""
    arguments = parse_or_exit(_card_parser(), words)

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


def _card_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="rlr-peft card", description="Writes the model card of an output folder again, from its records."
    )
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


def push_command(words: Sequence[str]) -> int:
    """Checks access, uploads the folder's published files in one commit and downloads the adapter to compare it."""
    arguments = parse_or_exit(_push_parser(), words)

    from rlr_peft.build.reporting import set_up_logging

    set_up_logging()

    from rlr_peft.publishing.hub_client import open_destination
    from rlr_peft.publishing.publisher import publish
    from rlr_peft.publishing.uploads import published_files

    folder = Path(arguments.folder)
    try:
        config = _published_config(folder)
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


def _published_config(folder: Path) -> dict[str, Any]:
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


def _push_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="rlr-peft push",
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


def merge_command(words: Sequence[str]) -> int:
    """Loads both in float32, fuses the adapter into the base, saves the whole pipeline and its card."""
    arguments = parse_or_exit(_merge_parser(), words)
    output = Path(arguments.output)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        say(f"error: --output: expected a new or empty folder, got {output}; choose another.", sys.stderr)
        return 2
    for problem in () if arguments.revision is None else check_revision("--revision", arguments.revision):
        exit_with(ConfigError(problem))

    from rlr_peft.build.reporting import set_up_logging

    set_up_logging()

    import torch

    from rlr_peft.build.pipeline import DTYPES, load_pipeline
    from rlr_peft.build.reporting import as_config_error, reporting_errors
    from rlr_peft.chain.families import GENERIC, family_of_class
    from rlr_peft.chain.scheduler import build_scheduler
    from rlr_peft.config import ModelArguments
    from rlr_peft.durable_files import rename_directory
    from rlr_peft.lora import check_adapter, find_adapter, load_fitting_lora, merge_lora
    from rlr_peft.publishing.card import stored_record
    from rlr_peft.publishing.merged_card import Merged, write_merged_card

    with reporting_errors(), as_config_error():
        revision = arguments.adapter_revision
        adapter = find_adapter(arguments.adapter if revision is None else f"{arguments.adapter}@{revision}")
        check_adapter(adapter)
        base = ModelArguments(
            pretrained_model_name_or_path=arguments.base, revision=arguments.revision, variant=arguments.variant
        )
        pipeline = load_pipeline(base, torch.device("cpu"))
        load_fitting_lora(pipeline, adapter)
        record = stored_record(adapter.folder)  # of the adapter's run, where it lies beside it
        if record is not None and record.sampling.scheduler is not None:
            pipeline.scheduler = build_scheduler(
                pipeline.scheduler.config, record.sampling.scheduler, record.sampling.scheduler_options
            )
        merged = merge_lora(pipeline)
        if arguments.dtype != "fp32":
            pipeline.to(dtype=DTYPES[arguments.dtype])
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".merging-", dir=output.parent) as aside:
            pipeline.save_pretrained(Path(aside) / "pipeline")
            family = family_of_class(type(pipeline).__name__) or GENERIC
            facts = Merged(
                base=arguments.base,
                base_revision=arguments.revision,
                adapter=arguments.adapter,
                adapter_revision=revision,
                parts=merged,
                dtype=str(DTYPES["no" if arguments.dtype == "fp32" else arguments.dtype]).removeprefix("torch."),
                pipeline_tag=family.pipeline_tag,
                tags=family.tags,
                record=record,
            )
            write_merged_card(Path(aside) / "pipeline", facts)
            if output.exists():
                output.rmdir()
            rename_directory(Path(aside) / "pipeline", output)
    say(f"Merged the adapter into the {' and the '.join(merged)}. Load the pipeline with")
    say(f"  pipe = diffusers.DiffusionPipeline.from_pretrained({str(output)!r})")
    return 0


def _merge_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="rlr-peft merge", description="Fuses an adapter into its base and saves a full pipeline."
    )
    parser.add_argument("--base", type=str, required=True, help="Hub id or folder of the base, or tiny-shapes")
    parser.add_argument("--adapter", type=str, required=True, help="folder, file or Hub id of the adapter")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="new folder of the pipeline")
    parser.add_argument(
        "--dtype", type=Literal["fp32", "fp16", "bf16"], default="fp32", help="number format of the saved weights"
    )
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit of the base")
    parser.add_argument("--variant", type=str | None, default=None, help="variant of the base's weights, such as fp16")
    parser.add_argument("--adapter_revision", type=str | None, default=None, help="the same of the adapter")
    return parser
