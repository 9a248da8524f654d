"""The Python snippet of the card: it runs as it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from rlr_peft.publishing.run_record import RunRecord
from rlr_peft.tiny_shapes import PIPELINE_NAME

BaseKind = Literal["embedded", "folder", "hub"]


def base_kind(base_model: str) -> BaseKind:
    """Where the base comes from: shipped with rlr-peft, a folder of this machine, or the Hub."""
    if base_model == PIPELINE_NAME:
        return "embedded"
    return "folder" if Path(base_model).expanduser().is_dir() else "hub"


def usage_snippet(record: RunRecord, prompt: str) -> str:
    """Code that loads the base and the adapter, draws one image and saves it as `image.png`.

    Without `record.repo_id` it must be run in the adapter's folder.
    """
    kind = base_kind(record.base_model)
    imports = ["import torch", "from diffusers import DiffusionPipeline"]
    if kind == "embedded":
        imports += ["", "from rlr_peft.tiny_shapes import pipeline_path"]
        base = "pipeline_path()"
    elif kind == "folder":
        base = _quoted(str(Path(record.base_model).expanduser().resolve()))
    else:
        base = _quoted(record.base_model)
    adapter = _quoted(record.repo_id or ".")
    arguments = "".join(
        f"    {name}={_quoted(value) if isinstance(value, str) else repr(value)},\n"
        for name, value in record.inference.items()
    )
    # Without `weight_name` the file is guessed by asking the Hub, which fails offline and for private repositories.
    return "\n".join(imports) + (
        f"\n\npipe = DiffusionPipeline.from_pretrained({base}, dtype=torch.{record.dtype})\n"
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")\n'
        f"pipe.load_lora_weights({adapter}, weight_name={_quoted(record.weight_name)})\n"
        "\nimage = pipe(\n"
        f"    {_quoted(prompt)},\n"
        f"{arguments}"
        "    generator=torch.Generator().manual_seed(0),\n"
        ").images[0]\n"
        'image.save("image.png")'
    )


def _quoted(text: str) -> str:
    """A Python string in double quotes: every JSON string is one."""
    return json.dumps(text, ensure_ascii=False)
