"""`run_record.json`: what the model card needs to know about a run, kept beside the card as plain values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from rlr_peft.durable_files import replacing_file, stays_inside
from rlr_peft.errors import UserError
from rlr_peft.foreign_text import printable_values
from rlr_peft.redaction import redacted_values

# Training prompts on a card. A record holds no more: there may be half a million.
SHOWN_PROMPTS = 10


@dataclass(frozen=True)
class ImagePair:
    """One prompt drawn by base and adapter from the same noise.

    Attributes:
        prompt: of both.
        base, adapter: file names in the card's folder.
        base_score, adapter_score: the trained reward of each.
    """

    prompt: str
    base: str
    adapter: str
    base_score: float
    adapter_score: float


@dataclass(frozen=True)
class RunRecord:
    """Facts about a run. What is unknown stays at its default and is left out of the card.

    Attributes:
        base_model: as given to `--pretrained_model_name_or_path`: "tiny-shapes", a Hub id or a local folder.
        reward_name: name of the reward that was trained on.
        config: the resolved configuration, name to plain value.
        reward_weights: name -> weight of the rewards of a weighted sum; empty where one alone is trained on.
        heldout_name: name of the held-out reward, of several the first.
        heldout_names: of several held-out rewards.
        metrics: as in `metrics.json`: `reward_before`, `reward_before_se`, `reward_after`, `reward_after_se`,
            `reward_gain`, `reward_gain_se`, `reward_win_rate`, the same with `heldout_`, and with `reward/NAME_` and
            `heldout/NAME_` for each of several rewards; `n`, `prompts` (how many were drawn), `kl` from the base with
            `kl_se` and `kl_n`, `seconds` (of training), `peak_memory_mb`, `denoiser_evaluations`, `steps`. A reward
            with any of its six numbers or `n` missing gets no row.
        evaluation_prompts: what the numbers were measured on, as it stands in "On ... its reward rose"; say "unseen
            prompts" only if none of them was trained on.
        evaluation: sentences on how the numbers were measured (steps, guidance, seeds).
        selection: sentences on what chose these weights: when training was to stop, and what that was read off.
        settings: what training was set to, in words: name -> value.
        estimator: sentences on the gradient estimator.
        coverage: a sentence on the weights of the steps (unbiased, or biased by choice).
        pipeline_tag: the Hub's task name.
        license: the Hub's licence id; inherited from the base.
        license_name: for licence "other".
        license_link: for licence "other".
        datasets: Hub ids of the datasets that the prompts come from.
        tags: of the pipeline's family, for example "stable-diffusion"; the common ones are added, and "rlr" if
            `config["estimator"]` is one of its presets.
        base_options: what picks the files of a base on the Hub, `revision` and `variant`.
        components: parts of the pipeline that replaced the base's or came to it, `vae` or `motion_adapter` -> Hub id or
            folder.
        dtype: torch dtype of the snippet's pipeline, "float32", "float16" or "bfloat16".
        inference: further arguments of the pipeline's call in the snippet, for example `num_inference_steps`.
        scheduler: class of diffusers that the snippet's pipeline draws with, as the numbers were measured; None leaves
            the base's own.
        scheduler_options: its settings over the config of the base's own.
        scheduler_sigmas: noise levels that it must be told where the pipeline's call takes none.
        snippet_notes: sentences on what the snippet draws otherwise than the numbers were measured with.
        negative_prompts: of shown prompts that have one of their own, by prompt.
        repo_id: of the adapter on the Hub; None makes a snippet that runs in the adapter's folder.
        hub_revision: branch of that repository; None is its main one.
        weight_name: file name of the adapter.
        stages: share of the steps by stage of a Diffusive Chain-of-Thought, noise first; empty without one.
        stage_prompts: the stage prompts of one training prompt, as an example.
        denoisers: attributes of the pipeline that have an adapter; that of `transformer_2` is in a subfolder.
        peft_config: arguments of `peft.LoraConfig` where diffusers has no loader for the denoiser; None where it has.
        fps: frames per second of the videos; None for images.
        prompts: the first of the training prompts; a card shows no more than `SHOWN_PROMPTS`.
        prompt_count: how many training prompts there were; None for a stream.
        before_after: file name of the before/after figure in the card's folder.
        before_after_prompts: the prompts in that figure.
        pairs: single images of base and adapter.
        reward_curve: file name of the reward curve in the card's folder.
        images: file name in the card's folder and prompt of images drawn with the adapter, for the gallery.
        command: the command line of the run, without access tokens.
        hardware: for example "1 x NVIDIA H200" or "2 CPU cores".
        versions: package name to version.
        commit: of rlr-peft.
    """

    base_model: str
    reward_name: str
    config: Mapping[str, object]
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    heldout_name: str | None = None
    heldout_names: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation_prompts: str = "the evaluation prompts"
    evaluation: str | None = None
    selection: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    estimator: Sequence[str] = ()
    coverage: str | None = None
    pipeline_tag: str = "text-to-image"
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    base_options: Mapping[str, str] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    inference: Mapping[str, object] = field(default_factory=dict)
    scheduler: str | None = None
    scheduler_options: Mapping[str, object] = field(default_factory=dict)
    scheduler_sigmas: Sequence[float] = ()
    snippet_notes: Sequence[str] = ()
    negative_prompts: Mapping[str, str] = field(default_factory=dict)
    repo_id: str | None = None
    hub_revision: str | None = None
    weight_name: str = "pytorch_lora_weights.safetensors"
    stages: Mapping[str, float] = field(default_factory=dict)
    stage_prompts: Sequence[str] = ()
    denoisers: Sequence[str] = ("unet",)
    peft_config: Mapping[str, object] | None = None
    fps: int | None = None
    prompts: Sequence[str] = ()
    prompt_count: int | None = None
    before_after: str | None = None
    before_after_prompts: Sequence[str] = ()
    pairs: Sequence[ImagePair] = ()
    reward_curve: str | None = None
    images: Sequence[tuple[str, str]] = ()
    command: str | None = None
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None


def printable_record(record: RunRecord) -> RunRecord:
    """The record with `printable` texts, but for the pairs of images."""
    return RunRecord(**{one.name: printable_values(getattr(record, one.name)) for one in fields(record)})


RECORD_NAME = "run_record.json"


class RecordError(UserError, ValueError):
    """The folder has no usable run record."""


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
    with replacing_file(path) as aside:
        text = json.dumps(redacted_values(dataclasses.asdict(card)), indent=1, ensure_ascii=False)
        aside.write_text(text + "\n", encoding="utf-8")
    return path


def _check(record: RunRecord) -> None:
    """A record may have come with somebody's adapter: what becomes a path or code is a file name or a Python name.

    Raises:
        ValueError: one is not.
    """
    pairs = [name for pair in record.pairs for name in (pair.base, pair.adapter)]
    single = (record.before_after, record.reward_curve, record.weight_name)
    for name in (*(one for one in single if one is not None), *pairs, *(image for image, _ in record.images)):
        if not stays_inside(name):
            raise ValueError(f"expected the name of a file in its folder, got {name!r}")
    words = (record.inference, record.base_options, record.components, record.peft_config or ())
    for name in (record.dtype, *record.denoisers, *(key for mapping in words for key in mapping)):
        if not name.isidentifier():
            raise ValueError(f"expected a name of Python, got {name!r}")
    for number in (*record.metrics.values(), record.fps or 0):
        if not isinstance(number, (int, float)):
            raise ValueError(f"expected a number, got {number!r}")


def load_stored_card(directory: Path) -> StoredCard:
    """What `save_stored_card` wrote.

    Raises:
        RecordError: there is none, it is damaged, or another version of rlr-peft wrote it.
    """
    path = directory / RECORD_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        record = saved.pop("record")
        record["images"] = [tuple(image) for image in record["images"]]
        record["pairs"] = [ImagePair(**pair) for pair in record["pairs"]]
        card = StoredCard(record=RunRecord(**record), **saved)
        _check(card.record)
        return card
    except FileNotFoundError:
        raise RecordError(
            f"Expected {RECORD_NAME} in {directory}, as train_rlr_lora.py writes it at the end of a run, got no such "
            "file; check the path."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{path} cannot be read ({error}): it is damaged, or another version of rlr-peft wrote it; use that one."
        ) from error
