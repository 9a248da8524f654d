"""Where a base comes from, and the licence that an adapter inherits from it.

The licence is what the base's own card says, else what its publisher does.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from huggingface_hub import ModelCard, hf_hub_download

from rlr_peft.foreign_text import in_code, printable
from rlr_peft.publishing.hub_client import FAILURES, in_words
from rlr_peft.tiny_shapes import PIPELINE_NAME

logger = logging.getLogger(__name__)

BaseKind = Literal["embedded", "folder", "hub"]


@dataclass(frozen=True)
class License:
    """As in a card's metadata; `name` and `link` belong to `id` "other"."""

    id: str | None = None
    name: str | None = None
    link: str | None = None


# Start of a Hub id -> licence, for bases whose card cannot be read: the longest start that fits counts. A base that is
# not listed gets none, for models that derive from one of these have licences of their own.
KNOWN = {
    "CompVis/stable-diffusion-v1": License("creativeml-openrail-m"),
    "runwayml/stable-diffusion-v1-5": License("creativeml-openrail-m"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": License("creativeml-openrail-m"),
    "stabilityai/stable-diffusion-2": License("openrail++"),
    "stabilityai/stable-diffusion-xl-base": License("openrail++"),
    "stabilityai/stable-diffusion-3": License("other", "stabilityai-ai-community", "LICENSE.md"),
    "black-forest-labs/FLUX.1-dev": License("other", "flux-1-dev-non-commercial-license", "LICENSE.md"),
    "black-forest-labs/FLUX.1-schnell": License("apache-2.0"),
    "Qwen/Qwen-Image": License("apache-2.0"),
    "Wan-AI/Wan2": License("apache-2.0"),
    "ali-vilab/text-to-video-ms-1.7b": License("cc-by-nc-4.0"),
}


def base_kind(base_model: str) -> BaseKind:
    """Where the base comes from: shipped with rlr-peft, a folder or file of this machine, or the Hub."""
    if base_model == PIPELINE_NAME:
        return "embedded"
    path = Path(base_model).expanduser()
    return "folder" if path.is_absolute() or path.exists() else "hub"


def hub_link(name: str) -> str:
    """A repository of the Hub in Markdown; a name that no repository can have is no link."""
    is_repository = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII)
    return f"[{name}](https://huggingface.co/{name})" if is_repository else in_code(name)


def base_license(base_model: str, *, revision: str | None = None, cache_dir: str | None = None) -> License:
    """The licence of a base; without `id` where it is not known.

    Args:
        base_model: "tiny-shapes", a Hub id or a local folder.
    """
    kind = base_kind(base_model)
    if kind == "embedded":
        return License("apache-2.0")
    found = None
    if kind == "folder":
        path = Path(base_model).expanduser() / "README.md"
        found = _of_card(path) if path.is_file() else None
    else:
        try:
            found = _of_card(Path(hf_hub_download(base_model, "README.md", revision=revision, cache_dir=cache_dir)))
        except FAILURES as error:
            logger.warning("The licence of %s could not be read from its card: %s", base_model, in_words(error))
        fitting = [start for start in KNOWN if base_model.startswith(start)]
        found = found or (KNOWN[max(fitting, key=len)] if fitting else None)
    if found is None:
        return License()
    return License(found.id, found.name, _absolute(found.link, base_model) if kind == "hub" else found.link)


def _of_card(path: Path) -> License | None:
    try:
        data = ModelCard.load(path).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("The licence of the base is not known: %s has no readable metadata (%s)", path, error)
        return None
    found = [data.get(name) for name in ("license", "license_name", "license_link")]
    license_id, name, link = (printable(value) if isinstance(value, str) else None for value in found)
    return License(license_id, name, link) if license_id else None


def _absolute(link: str | None, repo_id: str) -> str | None:
    """A link that was relative to the base's repository."""
    if link is None or "://" in link:
        return link
    return f"https://huggingface.co/{repo_id}/blob/main/{link}"
