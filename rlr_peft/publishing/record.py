"""`run_record.json`: the facts of a run that its model card is made of, kept beside the card as plain values.

Among them where its base comes from, and the licence that an adapter inherits: what the base's own card says, else what
its publisher does.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub import ModelCard, hf_hub_download

from rlr_peft.errors import UserError
from rlr_peft.files import MAX_DEPTH, WEIGHT_NAME, is_nested_too_deep, read_plain_text, replacing_file, stays_inside
from rlr_peft.foreign_text import in_code, printable
from rlr_peft.publishing.hub_client import FAILURES, in_words
from rlr_peft.redaction import redacted_values
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


def whole_place(name: str) -> str:
    """A Hub id as it is; what lies on this machine with its whole path."""
    return str(Path(name).expanduser().resolve()) if base_kind(name) == "folder" else name


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


RECORD_NAME = "run_record.json"
VERSION = 2
MAX_BYTES = 2**26
# Training prompts on a card. A record holds no more: there may be half a million.
SHOWN_PROMPTS = 10


class RecordError(UserError, ValueError):
    """The folder has no usable run record."""


@dataclass(frozen=True)
class Base:
    """The pipeline that the adapter belongs to.

    Attributes:
        model: as given to `--pretrained_model_name_or_path`: "tiny-shapes", a Hub id, a local folder or a single file.
        options: what picks its files on the Hub, `revision` and `variant`; for a single file `config`, the place of
            its configs.
        components: parts that replaced its own or came to it, `vae` or `motion_adapter` -> Hub id or folder.
        dtype: torch dtype of the snippet's pipeline, "float32", "float16" or "bfloat16".
        pipeline_tag: the Hub's task name.
        tags: of its family, for example "stable-diffusion".
        license: which the adapter inherits.
        single_file_class: the pipeline class that reads a single file; None for other bases.
    """

    model: str
    options: Mapping[str, str] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    pipeline_tag: str = "text-to-image"
    tags: Sequence[str] = ()
    license: License = field(default_factory=License)
    single_file_class: str | None = None


@dataclass(frozen=True)
class Adapter:
    """The adapter, and where it lies.

    Attributes:
        denoisers: attributes of the pipeline that it is for; that of `transformer_2` is in a subfolder.
        weight_name: its file.
        peft_config: arguments of `peft.LoraConfig` where diffusers has no loader for the denoiser; None where it has.
        repo_id: on the Hub; None makes a snippet that runs in the adapter's folder.
        revision: branch of that repository; None is its main one.
    """

    denoisers: Sequence[str] = ("unet",)
    weight_name: str = WEIGHT_NAME
    peft_config: Mapping[str, object] | None = None
    repo_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Rewards:
    """What was trained on, and what was only measured.

    Attributes:
        name: of the reward that was trained on.
        weights: name -> weight of the parts of a weighted sum; empty where one reward alone is trained on.
        heldout: names of the held-out rewards.
    """

    name: str
    weights: Mapping[str, float] = field(default_factory=dict)
    heldout: Sequence[str] = ()


@dataclass(frozen=True)
class Sampling:
    """How the images that were measured were drawn, and how a pipeline alone draws them.

    Attributes:
        words: steps, scheduler, eta and guidance scale, as in "Drawn with ...".
        call: arguments of the pipeline's call, for example `num_inference_steps`.
        negative_prompts: of shown prompts that have one of their own, by prompt.
        scheduler: class of diffusers that the numbers were measured with; None leaves the base's own.
        scheduler_options: its settings over the config of the base's own.
        scheduler_sigmas: noise levels that it must be told where the pipeline's call takes none.
        difference: a sentence on what the snippet draws otherwise; None where it draws the same.
        fps: frames per second of videos; None for images.
    """

    words: str | None = None
    call: Mapping[str, object] = field(default_factory=dict)
    negative_prompts: Mapping[str, str] = field(default_factory=dict)
    scheduler: str | None = None
    scheduler_options: Mapping[str, object] = field(default_factory=dict)
    scheduler_sigmas: Sequence[float] = ()
    difference: str | None = None
    fps: int | None = None


@dataclass(frozen=True)
class Prompts:
    """What was drawn.

    Attributes:
        shown: the first of the training prompts, `SHOWN_PROMPTS` at the most.
        count: how many training prompts there were; None for a stream.
        evaluation: what the numbers were measured on, as in "On ... its reward rose"; "unseen prompts" only if none of
            them was trained on.
        datasets: Hub ids of the datasets that they come from.
        sources: name and share of the samples of every source, where there are several.
        stages: share of the steps by stage of a Diffusive Chain-of-Thought, noise first; empty without one.
        stage_prompts: the stage prompts of one training prompt, as an example; in a contrast that prompt as a whole.
        away_from: what guidance leads away from in each of its stages, in a contrast; empty in parts.
    """

    shown: Sequence[str] = ()
    count: int | None = None
    evaluation: str = "the evaluation prompts"
    datasets: Sequence[str] = ()
    sources: Sequence[tuple[str, float]] = ()
    stages: Mapping[str, float] = field(default_factory=dict)
    stage_prompts: Sequence[str] = ()
    away_from: Sequence[str] = ()


@dataclass(frozen=True)
class ImagePair:
    """One prompt drawn by base and adapter from the same noise.

    Attributes:
        prompt: of both.
        base, adapter: file names in the card's folder.
        base_score, adapter_score: the trained reward of each.
        condition: file name of the picture that both were drawn from; None for none.
    """

    prompt: str
    base: str
    adapter: str
    base_score: float
    adapter_score: float
    condition: str | None = None


@dataclass(frozen=True)
class Images:
    """Images in the card's folder, by file name.

    Attributes:
        before_after: the figure of base and adapter side by side.
        before_after_prompts: the prompts in it.
        reward_curve: the curve of training.
        gallery: file name and prompt of images that the adapter drew.
        pairs: single images of base and adapter.
    """

    before_after: str | None = None
    before_after_prompts: Sequence[str] = ()
    reward_curve: str | None = None
    gallery: Sequence[tuple[str, str]] = ()
    pairs: Sequence[ImagePair] = ()


@dataclass(frozen=True)
class RunRecord:
    """Facts about a run. What is unknown stays at its default and is left out of the card.

    Attributes:
        base, adapter, rewards, sampling, prompts, images: see there.
        config: the resolved configuration, name to plain value.
        metrics: as in `metrics.json`: `reward_before`, `reward_before_se`, `reward_after`, `reward_after_se`,
            `reward_gain`, `reward_gain_se`, `reward_win_rate`, the same with `heldout_`, and with `reward/NAME_` and
            `heldout/NAME_` for each of several rewards; `n`, `prompts` (how many were drawn), `kl` from the base with
            `kl_se` and `kl_n`, `seconds` (of training), `peak_memory_mb`, `denoiser_evaluations`, `steps`. A reward
            with any of its six numbers or `n` missing gets no row.
        training: what the configuration does not say. Numbers: `steps` of the chain, `guidance_scale`, `samples` of an
            update, `processes`, `learning_rate` at the end, `learning_rate_halvings` where the reward fell, `weights`
            (trainable ones), `first_order` (smallest and largest K).
            `method` is the estimator's name, `objects` what came as a Python object, part -> name.
            Sentences or None: `terms` of the estimator, `chain_of_thought`, `stopped_early`, `verdict` (nothing was
            learnt), `coverage`; `reward_decoder` is the name of the small decoder that the reward saw.
        machine: `command` without access tokens, `hardware`, `versions` (package -> version), `commit` of rlr-peft.
    """

    base: Base
    rewards: Rewards
    config: Mapping[str, object]
    metrics: Mapping[str, float] = field(default_factory=dict)
    adapter: Adapter = Adapter()
    sampling: Sampling = Sampling()
    prompts: Prompts = Prompts()
    images: Images = Images()
    training: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredCard:
    """A card's facts and what the user added to it.

    Attributes:
        record: the run's facts.
        template: text of a template in place of the shipped one.
        extra_text: Markdown of the user's own, put after the introduction.
        readme_sha256: of the card as it was written last, by which a user's edits are noticed.
    """

    record: RunRecord
    template: str | None = None
    extra_text: str | None = None
    readme_sha256: str | None = None


def save_stored_card(directory: Path, card: StoredCard) -> Path:
    """Writes `run_record.json`; returns its path."""
    path = directory / RECORD_NAME
    content = {"version": VERSION, **redacted_values(dataclasses.asdict(card))}
    with replacing_file(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load_stored_card(directory: Path) -> StoredCard:
    """What `save_stored_card` wrote.

    Raises:
        RecordError: there is none, it is damaged, or another version of rlr-peft wrote it.
    """
    path = directory / RECORD_NAME
    if not os.path.lexists(path):
        raise RecordError(
            f"Expected {RECORD_NAME} in {directory}, as train_rlr_lora.py writes it at the end of a run, got no such "
            "file; check the path."
        )
    try:
        saved = json.loads(read_plain_text(path, MAX_BYTES))
        if is_nested_too_deep(saved):
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        version = saved.pop("version", 1) if isinstance(saved, dict) else type(saved).__name__
        if version != VERSION:
            raise ValueError(f"expected version {VERSION} of its form, got {version}")
        card: StoredCard = _typed(StoredCard, saved, "it")
        _check(card.record)
        return card
    except (ValueError, TypeError, RecursionError) as error:
        raise RecordError(
            f"{path} cannot be read ({error}): it is damaged, or another version of rlr-peft wrote it; use that one."
        ) from error


def _typed(kind: Any, value: Any, where: str) -> Any:
    """What JSON says as a value of the kind: a dataclass, or what its fields are annotated with.

    Raises:
        ValueError: it is none.
        TypeError: a field is missing, or unknown.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind in (Any, object):
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        return kind(**{name: _typed(hints.get(name, Any), one, f"{where}.{name}") for name, one in value.items()})
    if origin is UnionType:
        (kind,) = (part for part in parts if part is not NoneType)  # of X | None
        return None if value is None else _typed(kind, value, where)
    if origin is Mapping and isinstance(value, dict):
        return {name: _typed(parts[1], one, f"{where}.{name}") for name, one in value.items()}
    if origin is Sequence and isinstance(value, list):
        return [_typed(parts[0], one, where) for one in value]
    if origin is tuple and isinstance(value, list) and len(value) == len(parts):
        return tuple(_typed(part, one, where) for part, one in zip(parts, value, strict=True))
    if kind is type(value) or (kind is float and type(value) is int):
        return value
    raise ValueError(f"expected another type of {where}, got {value!r:.60}")


def _check(record: RunRecord) -> None:
    """A record may have come with somebody's adapter: what becomes a path or code is a file name or a Python name.

    Raises:
        ValueError: one is not.
    """
    images = record.images
    pairs = [name for pair in images.pairs for name in (pair.base, pair.adapter, pair.condition) if name is not None]
    single = (images.before_after, images.reward_curve, record.adapter.weight_name)
    for name in (*(one for one in single if one is not None), *pairs, *(image for image, _ in images.gallery)):
        if not stays_inside(name):
            raise ValueError(f"expected the name of a file in its folder, got {name!r}")
    words = (record.sampling.call, record.base.options, record.base.components, record.adapter.peft_config or ())
    classes = (record.base.dtype, record.sampling.scheduler or "DDIMScheduler")
    for name in (*classes, *record.adapter.denoisers, *(key for mapping in words for key in mapping)):
        if not name.isidentifier():
            raise ValueError(f"expected a name of Python, got {name!r}")
