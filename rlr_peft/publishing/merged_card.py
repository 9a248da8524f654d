"""The card of a merged pipeline: what was fused into what, under which licence, and how to load it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlr_peft.files import replacing_file
from rlr_peft.foreign_text import in_code, printable_values
from rlr_peft.publishing.card import card_metadata, render_template
from rlr_peft.publishing.record import BaseKind, RunRecord, base_kind, base_license, hub_link
from rlr_peft.publishing.snippet import call_arguments, told_sigmas

TEMPLATE = Path(__file__).parent / "merged_card_template.md"
TAGS = ("diffusers", "lora")


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
    hub_ids = [name for name in (merged.base, merged.adapter) if _kind(name) == "hub"]
    metadata = card_metadata(
        merged.pipeline_tag,
        [*TAGS, *merged.tags],
        licence,
        # Anything but Hub ids here would be dead links.
        base_model=hub_ids or None,
        base_model_relation="merge" if hub_ids else None,
    )
    variables = {
        "base": _place(merged.base, merged.base_revision),
        "adapter": _place(merged.adapter, merged.adapter_revision),
        "parts": merged.parts,
        "dtype": merged.dtype,
        "record": merged.record and printable_values(dataclasses.asdict(merged.record)),
        "snippet": _snippet(merged),
        "license": licence.id,
    }
    path = directory / "README.md"
    with replacing_file(path) as aside:
        text = render_template(TEMPLATE.read_text(encoding="utf-8"), metadata, variables)
        aside.write_text(text, encoding="utf-8", newline="\n")
    return path


def _snippet(merged: Merged) -> str:
    """Loads the pipeline and, where the adapter's run is known, draws as its numbers were measured."""
    record = merged.record
    is_told = record is not None and record.sampling.scheduler_sigmas
    lines = [
        *(["from functools import partial", ""] if is_told else []),
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained(".", dtype=torch.{merged.dtype})',
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
    ]
    if record is not None:
        prompt = next(iter(record.prompts.shown), "a photo of a cat")
        arguments = [f"prompt={json.dumps(prompt, ensure_ascii=False)}", *call_arguments(record, prompt)]
        lines += [
            *([told_sigmas(record)] if is_told else [""]),
            f"result = pipe({', '.join(arguments)}, generator=torch.Generator().manual_seed(0))",
        ]
    return "\n".join(lines)


def _kind(name: str) -> BaseKind:
    return "folder" if Path(name).expanduser().exists() else base_kind(name)


def _place(name: str, revision: str | None) -> dict[str, str]:
    """What a base or an adapter is called, and a link to it."""
    kind = _kind(name)
    label = Path(name).expanduser().resolve().name if kind == "folder" else name
    links = {
        "folder": in_code(label),
        "embedded": f"{in_code(label)}, the small one that ships with rlr-peft,",
        "hub": f"{hub_link(label)}{f' at {in_code(revision)}' if revision else ''}",
    }
    return {"label": label, "link": links[kind]}
