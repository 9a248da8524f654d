"""The card of a merged pipeline: what was fused into what, under which licence, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from rlr_peft.durable_files import replacing_file
from rlr_peft.foreign_text import fenced, in_cell, in_code, printable
from rlr_peft.publishing.licenses import License, base_license
from rlr_peft.publishing.record import RunRecord
from rlr_peft.publishing.snippet import BaseKind, base_kind, call_arguments, hub_link, told_sigmas
from rlr_peft.redaction import redacted

TAGS = ("diffusers", "lora")
PARTIAL = "from functools import partial\n\n"


@dataclass(frozen=True)
class Merged:
    """What is known of a merged pipeline.

    Attributes:
        base: as given to `--base`: "tiny-shapes", a Hub id or a local folder.
        base_revision: of the Hub repository; None for its newest.
        adapter: a Hub id, a folder or a file.
        adapter_revision: of the Hub repository; None for its newest.
        parts: attributes of the pipeline that were changed.
        dtype: torch dtype of the saved weights, "float32", "float16" or "bfloat16".
        pipeline_tag: the Hub's task name.
        tags: of the pipeline's family.
        record: of the adapter's run; None where it lies beside none.
    """

    base: str
    base_revision: str | None
    adapter: str
    adapter_revision: str | None
    parts: Sequence[str]
    dtype: str
    pipeline_tag: str
    tags: Sequence[str]
    record: RunRecord | None = None


def write_merged_card(directory: Path, merged: Merged) -> Path:
    """Writes `directory/README.md`; returns its path. Paths of this machine stay out of it."""
    licence = base_license(merged.base, revision=merged.base_revision)
    path = directory / "README.md"
    with replacing_file(path) as aside:
        aside.write_text(printable(redacted(_card(merged, licence))), encoding="utf-8", newline="\n")
    return path


def _card(merged: Merged, licence: License) -> str:
    base, adapter = _link(merged.base, merged.base_revision), _link(merged.adapter, merged.adapter_revision)
    changed = " and the ".join(merged.parts)
    record = merged.record
    training = "" if record is None else f", which was trained on the reward {in_code(record.reward_name)}"
    scheduler = (
        ""
        if record is None or record.scheduler is None
        else (
            f" Its scheduler is the {record.scheduler} that the adapter's numbers were measured with"
            f"{_settings(record.scheduler_options)}."
        )
    )
    rounded = "" if merged.dtype == "float32" else f", then rounded to {merged.dtype}"
    is_told = record is not None and record.scheduler_sigmas
    snippet = (
        f"{PARTIAL if is_told else ''}"
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained(".", dtype=torch.{merged.dtype})\n'
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")'
        f"{'' if record is None else _drawing(record)}"
    )
    terms = "The licence terms of the base apply." if licence.id else "Its licence is that of the base, not known here."
    return f"""---
{_metadata(merged, licence)}
---

# {in_cell(_label(merged.base))} with {in_cell(_label(merged.adapter))} fused in

The pipeline {base} with the LoRA adapter {adapter} added to the weights of its {changed}{training}. Everything else is
the base's.{scheduler} The sum was taken in float32{rounded} by `rlr-peft merge`; no LoRA layers are left.

## Use it

In the folder of this file:

{fenced(snippet, "python")}

## Limits

Nothing was measured of this pipeline. Numbers on the adapter's own card were measured with base and adapter apart, from
which rounding may differ a little. {terms} The base's limits and biases remain, and where the adapter's reward is wrong
about an image, so is this pipeline.
"""


def _settings(options: Mapping[str, object]) -> str:
    return f" ({', '.join(f'{name} {value}' for name, value in options.items())})" if options else ""


def _drawing(record: RunRecord) -> str:
    """Lines that draw as the adapter's numbers were measured."""
    prompt = next(iter(record.prompts), "a photo of a cat")
    told = f"\n{told_sigmas(record).rstrip()}" if record.scheduler_sigmas else ""
    arguments = [json.dumps(prompt, ensure_ascii=False), *call_arguments(record, prompt)]
    return f"{told}\n\nresult = pipe({', '.join(arguments)}, generator=torch.Generator().manual_seed(0))"


def _metadata(merged: Merged, licence: License) -> ModelCardData:
    hub_ids = [name for name in (merged.base, merged.adapter) if _kind(name) == "hub"]
    optional: dict[str, Any] = {
        "license": licence.id,
        "license_name": licence.name,
        "license_link": licence.link,
        # Anything but Hub ids here would be dead links.
        "base_model": hub_ids or None,
        "base_model_relation": "merge" if hub_ids else None,
    }
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=merged.pipeline_tag,
        tags=list(dict.fromkeys([merged.pipeline_tag, *TAGS, *merged.tags])),
        **{key: value for key, value in optional.items() if value is not None},
    )


def _kind(name: str) -> BaseKind:
    return "folder" if Path(name).expanduser().exists() else base_kind(name)


def _label(name: str) -> str:
    return Path(name).expanduser().resolve().name if _kind(name) == "folder" else name


def _link(name: str, revision: str | None) -> str:
    kind, label = _kind(name), _label(name)
    if kind != "hub":
        return in_code(label) if kind == "folder" else f"{in_code(label)}, the small one that ships with rlr-peft,"
    at = f" at {in_code(revision)}" if revision else ""
    return f"{hub_link(label)}{at}"
