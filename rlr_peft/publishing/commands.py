"""`rlr-peft card`, `push`, `merge`, `export`, `space`: what becomes of a finished run's folder and its adapter.

Model libraries are imported inside: a wrong flag is refused at once.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlr_peft.config import ConfigError, HubArguments
from rlr_peft.config.files import config_beside, read_found_config
from rlr_peft.config.knob import Group, knob, preset
from rlr_peft.config.model import DTYPE_NAMES, check_revision
from rlr_peft.config.parsing import check_output, read_words
from rlr_peft.errors import UserError
from rlr_peft.files import PlainFileError, read_plain_text
from rlr_peft.foreign_text import say

if TYPE_CHECKING:
    from rlr_peft.publishing.record import RunRecord

BASE_FILES = (
    *("pretrained_model_name_or_path", "single_file_config", "revision", "variant"),
    *("pretrained_vae_model_name_or_path", "pretrained_motion_adapter_name_or_path"),
)
"""Knobs of a run that say which files its pipeline is of."""


@dataclass(frozen=True)
class CardFlags(Group):
    """The card"""

    folder: str = knob(MISSING, "Output folder of a run.")
    template: str | None = knob(
        None, "Jinja2 template in place of the shipped one; it gets the variables of model_card_template.md."
    )
    extra_text: str | None = knob(None, "Markdown file that is put after the introduction.")
    plain: bool = knob(False, "Forget earlier template and extra text.")


def card_command(words: Sequence[str]) -> int:
    """Renders `README.md` from `run_record.json`; template and extra text are remembered there."""
    own = read_words(
        words,
        CardFlags,
        "rlr-peft card",
        "Write the model card of an output folder again, from its records.",
        place="folder",
        example="outputs/aesthetic --extra_text notes.md",
    ).own
    if own.plain and (own.template or own.extra_text):
        raise ConfigError("plain: expected no template and no extra_text with it, got one; drop one of the two.")

    from rlr_peft.build.folder_lock import only_writer
    from rlr_peft.publishing.card import write_card
    from rlr_peft.publishing.record import load_stored_card

    folder = Path(own.folder)
    card = load_stored_card(folder)
    if own.template is not None:
        card = replace(card, template=_text("template", own.template))
    if own.extra_text is not None:
        card = replace(card, extra_text=_text("extra_text", own.extra_text))
    if own.plain:
        card = replace(card, template=None, extra_text=None)
    with only_writer(folder):
        say(write_card(folder, card))
    return 0


def _text(name: str, path: str) -> str:
    try:
        text = read_plain_text(Path(path))
    except PlainFileError as error:
        raise ConfigError(f"{name}: expected a text file, got {path}: {error}; check the path.") from error
    if not text.strip():
        raise ConfigError(f"{name}: expected a text file, got {path}, which is empty; fill it.")
    return text


@dataclass(frozen=True)
class PushFlags(Group):
    """Where to"""

    folder: str = knob(MISSING, "Output folder of a run, or of a checkpoint.")
    hub_model_id: str | None = knob(
        None, "`owner/name` or `name`; null means that of config.yaml, or the folder's name."
    )
    hub_token: str | None = preset(HubArguments, "hub_token", None)
    hub_private_repo: bool = preset(HubArguments, "hub_private_repo", False)
    hub_revision: str | None = knob(
        None, "Branch to publish on, made when missing; null means that of config.yaml, or main."
    )


def push_command(words: Sequence[str]) -> int:
    """Checks access, uploads the folder's published files in one commit and downloads the adapter to compare it."""
    own = read_words(
        words,
        PushFlags,
        "rlr-peft push",
        "Publish an output folder, or a checkpoint's adapter, on the Hub.",
        place="folder",
        example="outputs/aesthetic --hub_model_id me/aesthetic",
    ).own

    from rlr_peft.publishing.hub_client import open_destination
    from rlr_peft.publishing.publisher import publish
    from rlr_peft.publishing.uploads import published_files

    folder = Path(own.folder)
    config = _published_config(folder)
    published_files(folder)  # a wrong path is refused before a repository is made
    if own.hub_model_id is None and "hub_model_id" in config:
        say(f"Publishing on {config['hub_model_id']}, as {folder / 'config.yaml'} says.")
    destination = open_destination(
        own.hub_model_id or _text_of(config, "hub_model_id", folder) or folder.resolve().name,
        token=own.hub_token,
        private=own.hub_private_repo or bool(config.get("hub_private_repo")),
        revision=own.hub_revision or _text_of(config, "hub_revision", folder),
    )
    say(publish(folder, destination))
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


@dataclass(frozen=True)
class MergeFlags(Group):
    """The merged pipeline"""

    adapter: str = knob(MISSING, "Folder, file or Hub id of the adapter.")
    output: str = knob(MISSING, "New folder of the pipeline.")
    base: str | None = knob(
        None, "Hub id or folder of the base, or tiny-shapes; null means that of the run beside the adapter."
    )
    dtype: Literal["fp32", "fp16", "bf16"] = knob("fp32", "Number format of the saved weights.")
    revision: str | None = knob(None, "Branch, tag or commit of the base.")
    variant: str | None = knob(None, "Variant of the base's weights, such as fp16.")
    adapter_revision: str | None = knob(None, "Branch, tag or commit of the adapter.")


def merge_command(words: Sequence[str]) -> int:
    """Loads both in float32, fuses the adapter into the base, saves the whole pipeline and its card."""
    own = read_words(
        words,
        MergeFlags,
        "rlr-peft merge",
        "Fuse an adapter into its base and save a full pipeline.",
        place="adapter",
        example="outputs/aesthetic --output merged",
    ).own
    output = Path(own.output)
    _check_new_folder(output)
    for problem in () if own.revision is None else check_revision("revision", own.revision):
        raise ConfigError(problem)

    import torch

    from rlr_peft.build.pipeline import DTYPES, load_pipeline
    from rlr_peft.build.reporting import as_config_error
    from rlr_peft.chain.families import GENERIC, family_of_class
    from rlr_peft.chain.grid import build_scheduler
    from rlr_peft.config import ModelArguments
    from rlr_peft.files import rename_directory
    from rlr_peft.lora import check_adapter, find_adapter, load_fitting_lora, merge_lora
    from rlr_peft.publishing.card import stored_record
    from rlr_peft.publishing.merged_card import Merged, write_merged_card

    with as_config_error():
        revision = own.adapter_revision
        adapter = find_adapter(own.adapter if revision is None else f"{own.adapter}@{revision}")
        check_adapter(adapter)
        record = stored_record(adapter.folder)  # of the adapter's run, where it lies beside it
        base = ModelArguments(**_merged_base(own, adapter.folder, record))
        pipeline = load_pipeline(base, torch.device("cpu"))
        load_fitting_lora(pipeline, adapter)
        if record is not None and record.sampling.scheduler is not None:
            pipeline.scheduler = build_scheduler(
                pipeline.scheduler.config, record.sampling.scheduler, record.sampling.scheduler_options
            )
        merged = merge_lora(pipeline)
        if own.dtype != "fp32":
            pipeline.to(dtype=DTYPES[own.dtype])
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".merging-", dir=output.parent) as aside:
            pipeline.save_pretrained(Path(aside) / "pipeline")
            family = family_of_class(type(pipeline).__name__) or GENERIC
            facts = Merged(
                base=base.pretrained_model_name_or_path,
                base_revision=base.revision,
                adapter=own.adapter,
                adapter_revision=revision,
                parts=merged,
                dtype=DTYPE_NAMES[own.dtype],
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


def _merged_base(own: MergeFlags, folder: Path, record: "RunRecord | None") -> dict[str, Any]:
    """What picks the base's files: what is given, or what the adapter's run says, its own VAE included."""
    given = {name: getattr(own, name) for name in ("revision", "variant") if getattr(own, name) is not None}
    if own.base is not None:
        return {"pretrained_model_name_or_path": own.base, **given}
    found = config_beside(str(folder))
    settings = {} if found is None else read_found_config(found, BASE_FILES)[0]
    if "pretrained_model_name_or_path" not in settings and record is not None:  # a pipeline that Python gave
        settings["pretrained_model_name_or_path"] = record.base.model
    base = settings.get("pretrained_model_name_or_path")
    if base is None:
        raise ConfigError(
            f"base: expected a Hub id or a folder, got none, and {own.adapter} does not say it; give --base."
        )
    say(f"The base is {base}, that of the adapter's run; --base takes another.")
    return settings | given


@dataclass(frozen=True)
class ExportFlags(Group):
    """The file"""

    adapter: str = knob(MISSING, "Folder, file or Hub id of the adapter.")
    output: str = knob(MISSING, "File to write, ending in .safetensors.")


def export_command(words: Sequence[str]) -> int:
    """Writes the adapter as one file that ComfyUI and its kind read."""
    own = read_words(
        words,
        ExportFlags,
        "rlr-peft export",
        "Write an adapter of Stable Diffusion, SDXL, SD3, FLUX or Qwen-Image as ComfyUI and its kind read it.",
        place="adapter",
        example="outputs/aesthetic --output ComfyUI/models/loras/aesthetic.safetensors",
    ).own
    output = Path(own.output)
    check_output(output, is_file=True)
    if output.suffix != ".safetensors":
        raise ConfigError(f"output: expected a file that ends in .safetensors, got {output}; rename it.")

    from rlr_peft.lora import export_adapter, find_adapter

    output.parent.mkdir(parents=True, exist_ok=True)
    export_adapter(find_adapter(own.adapter), output)
    say(output)
    return 0


@dataclass(frozen=True)
class SpaceFlags(Group):
    """The page"""

    adapter: str = knob(MISSING, "Folder, file or Hub id of the adapter.")
    output: str = knob("outputs/space", "New folder of the page.")
    base: str | None = knob(None, "Hub id or folder of the base; null means that of the run beside the adapter.")


def space_command(words: Sequence[str]) -> int:
    """Writes a folder that runs with Gradio on this machine, and on the Hub as a Space."""
    own = read_words(
        words,
        SpaceFlags,
        "rlr-peft space",
        "Write a Gradio page that draws base and adapter from the same noise, with a slider between them.",
        place="adapter",
        example="outputs/aesthetic --output space",
    ).own
    output = Path(own.output)
    _check_new_folder(output)

    from rlr_peft.build.reporting import as_config_error
    from rlr_peft.lora import find_adapter
    from rlr_peft.publishing.space import write_space

    with as_config_error():
        write_space(output, find_adapter(own.adapter), own.base)
    say(f"Install and start it with\n  pip install -r {output}/requirements.txt\n  python {output}/app.py")
    return 0


def _check_new_folder(output: Path) -> None:
    check_output(output)
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"output: expected a new or empty folder, got {output}; choose another.")
