"""The model card: `README.md` beside the adapter, filled from what the run measured and nothing else.

It is written, written again, and addressed to a repository, without losing a user's edits.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import TemplateError as JinjaError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from yaml import YAMLError

from rlr_peft.config.yaml_files import yaml_text
from rlr_peft.durable_files import replacing_file, stays_inside
from rlr_peft.errors import UserError
from rlr_peft.foreign_text import fenced, in_cell, in_code, one_line, printable, printable_values
from rlr_peft.intervals import decimals_of_scores, with_error
from rlr_peft.publishing.record import (
    RECORD_NAME,
    SHOWN_PROMPTS,
    ImagePair,
    RecordError,
    RunRecord,
    StoredCard,
    load_stored_card,
    printable_record,
    save_stored_card,
)
from rlr_peft.publishing.results import Result, results_of, verdicts
from rlr_peft.publishing.snippet import base_kind, hub_link, usage_snippet
from rlr_peft.redaction import redacted

logger = logging.getLogger(__name__)


class TemplateError(UserError, ValueError):
    """A user's template that cannot be rendered."""


def default_template_path() -> Path:
    """`model_card_template.md` as shipped inside the package.

    In the repository this is a link to the file of the same name at the top level; a built package holds a copy.
    """
    return Path(__file__).parent / "model_card_template.md"


def write_model_card(
    directory: Path, *, record: RunRecord, template: str | None = None, extra_text: str | None = None
) -> Path:
    """Write `directory/README.md`, replacing what is there; see `render_card`. Returns the path of the card."""
    path = Path(directory) / "README.md"
    text = render_card(directory, record=record, template=template, extra_text=extra_text)
    with replacing_file(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")
    return path


def render_card(
    directory: Path, *, record: RunRecord, template: str | None = None, extra_text: str | None = None
) -> str:
    """The card's text, with access tokens and passwords in URLs crossed out.

    Args:
        directory: the folder of the adapter. Images named in the record that are not there are left out.
        record: the facts of the run.
        template: a Jinja2 template in place of the shipped one; it gets the same variables and is rendered in Jinja's
            sandbox, since one that is stored with a run may be somebody else's: it reaches these variables, and neither
            Python nor files. Its time is not limited.
        extra_text: Markdown of the user's own, put after the introduction.

    Raises:
        TemplateError: the template is no Jinja2, names what is not there, or gives metadata that cannot be read.
    """
    directory = Path(directory)
    images = [(name, prompt) for name, prompt in record.images if _is_there(directory, name)]
    before_after = record.before_after if _is_there(directory, record.before_after) else None
    reward_curve = record.reward_curve if _is_there(directory, record.reward_curve) else None
    pairs = [pair for pair in record.pairs if _is_there(directory, pair.base) and _is_there(directory, pair.adapter)]
    known_prompts = [*(prompt for _, prompt in images), *record.before_after_prompts, *record.prompts]
    if not images and before_after:
        # The gallery wants one prompt with its image; the figure shows several.
        images = [(before_after, next(iter(record.before_after_prompts), "base and adapter side by side"))]
    # Programs read the metadata and undo what is written out in quotes there: those values are printable themselves.
    shown = printable_record(record)
    results = results_of(shown)
    metadata = card_metadata(shown, directory, printable_values(images), results)
    variables = {
        "has_gallery": bool(images),
        "before_after": before_after and quote(before_after),
        "reward_curve": reward_curve and quote(reward_curve),
        "has_page": (directory / "compare.html").is_file(),
        "has_scores": (directory / "scores.parquet").is_file(),
        "pairs": _pairs(pairs),
        "extra_text": extra_text.strip() if extra_text else None,
        "snippet": fenced(usage_snippet(record, next(iter(known_prompts), "a photo of a cat")), "python"),
        "snippet_differences": list(record.snippet_notes),
        "snippet_note": None if record.repo_id else "In the folder of this file:",
        **_names(shown),
        **_results(shown, results),
        **_training(shown),
    }
    if template is None:
        text = default_template_path().read_text(encoding="utf-8")
        card = ModelCard.from_template(metadata, template_str=text, **variables)
    else:
        card = _from_users_template(metadata, template, variables)
    return printable(redacted(f"{str(card).rstrip()}\n"))


def _from_users_template(metadata: ModelCardData, template: str, variables: dict[str, Any]) -> ModelCard:
    """The card of a template that may hold mistakes; a misspelt name would be an empty place on the card."""
    known = {*variables, *metadata.to_dict(), "card_data"}
    try:
        sandbox = ImmutableSandboxedEnvironment()
        named = find_undeclared_variables(sandbox.parse(template))
        unknown = sorted(named - known)
        if not unknown:
            given = {**metadata.to_dict(), **variables, "card_data": metadata.to_yaml()}
            return ModelCard(sandbox.from_string(template).render(given))
    except (JinjaError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, YAMLError) as error:
        raise TemplateError(f"The template of the card cannot be rendered ({error}); correct it.") from error
    near = [match for name in unknown for match in get_close_matches(name, known, 1)]
    meant = f" Did you mean {in_a_row(near)}?" if near else f" Its variables are {', '.join(sorted(variables))}."
    raise TemplateError(f"The template of the card names what is not there: {in_a_row(unknown)}.{meant}")


def _is_there(directory: Path, name: str | None) -> bool:
    if name is not None and not (stays_inside(name) and (directory / name).is_file()):
        logger.warning("The model card leaves out %s: there is no such file in %s", name, directory)
        return False
    return name is not None


def _names(record: RunRecord) -> dict[str, Any]:
    """What is trained on what."""
    kind = base_kind(record.base_model)
    label = Path(record.base_model).name if kind == "folder" else record.base_model
    base_text = {
        "embedded": "`tiny-shapes`, the small pipeline that ships with rlr-peft",
        "folder": f"the local pipeline {in_code(label)}",
        "hub": hub_link(label),
    }[kind]
    names = list(record.reward_weights) or [record.reward_name]
    rewards = "reward" if len(names) == 1 else "rewards"
    return {
        "title": in_cell(f"LoRA of {label.rsplit('/', 1)[-1]} for the {rewards} {in_a_row(names)}"),
        "base_text": base_text,
        "reward_name": record.reward_name,
        "reward_text": f"the {rewards} {in_a_row([in_code(name) for name in names])}",
    }


def _results(record: RunRecord, results: Sequence[Result]) -> dict[str, Any]:
    heldout = [in_code(result.name) for result in results if result.held_out]
    return {
        "verdicts": verdicts(record, list(results)),
        "result_rows": [result.row() for result in results],
        "has_win_rate": any(result.win_rate is not None for result in results),
        "evaluation": record.evaluation,
        "selection": record.selection,
        "heldout_names": in_a_row(heldout),
        "heldout_count": len(heldout),
        # Measured while training, where no prompts were kept for a comparison.
        "watched": None if heldout or record.heldout_name is None else in_code(record.heldout_name),
    }


def _training(record: RunRecord) -> dict[str, Any]:
    shown = [one_line(prompt) for prompt in record.prompts[:SHOWN_PROMPTS]]
    return {
        "estimator_text": " ".join([*record.estimator, *([record.coverage] if record.coverage else [])]),
        "stages": _stages(record),
        "evaluation_eta": record.config.get("evaluation_eta"),
        "facts": _facts(record),
        "command": fenced(record.command, "bash") if record.command else None,
        "config": fenced(yaml_text(record.config).rstrip(), "yaml"),
        "prompts": fenced("\n".join(shown), "text") if shown else None,
        "prompts_introduction": _prompts_introduction(len(shown), record.prompt_count),
    }


def _prompts_introduction(shown: int, count: int | None) -> str:
    if count is None:
        return "The first of its training prompts:"
    return f"The first {shown} of its {count:,} training prompts:" if count > shown else "Its training prompts:"


def _pairs(pairs: Sequence[ImagePair]) -> list[dict[str, str]]:
    decimals = decimals_of_scores([0.0, *(score for pair in pairs for score in (pair.base_score, pair.adapter_score))])
    return [
        {
            "prompt": in_cell(pair.prompt),
            "base": quote(pair.base),
            "adapter": quote(pair.adapter),
            "base_score": f"{pair.base_score:.{decimals}f}",
            "adapter_score": f"{pair.adapter_score:.{decimals}f}",
        }
        for pair in pairs
    ]


def _stages(record: RunRecord) -> list[dict[str, str]]:
    prompts = record.stage_prompts or [""] * len(record.stages)
    return [
        {"name": in_cell(name), "share": f"{share:.0%}", "prompt": in_cell(prompt)}
        for (name, share), prompt in zip(record.stages.items(), prompts)
    ]


def _facts(record: RunRecord) -> list[dict[str, str]]:
    metrics = record.metrics
    facts: dict[str, str | None] = {
        **record.settings,
        "updates": f"{metrics['steps']:,.0f}" if "steps" in metrics else None,
        "denoiser evaluations": (
            f"{metrics['denoiser_evaluations']:,.0f}" if "denoiser_evaluations" in metrics else None
        ),
        "training time": _duration(metrics["seconds"]) if "seconds" in metrics else None,
        "divergence from the base": _divergence(metrics),
        "peak memory": f"{metrics['peak_memory_mb']:,.0f} MB" if "peak_memory_mb" in metrics else None,
        "hardware": record.hardware,
        "packages": ", ".join(f"{name} {version}" for name, version in record.versions.items()) or None,
        "commit of rlr-peft": f"`{record.commit}`" if record.commit else None,
    }
    return [{"name": in_cell(name), "value": value.replace("|", "\\|")} for name, value in facts.items() if value]


def _divergence(metrics: Mapping[str, float]) -> str | None:
    if "kl" not in metrics:
        return None
    return f"{with_error(metrics['kl'], metrics['kl_se'])} nats (KL of {metrics['kl_n']:.0f} sampled paths)"


def in_a_row(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


COMMON_TAGS = ("diffusers", "diffusers-training", "lora", "template:sd-lora", "reward-fine-tuning")


def card_metadata(
    record: RunRecord, directory: Path, images: Sequence[tuple[str, str]], results: Sequence[Result]
) -> ModelCardData:
    """Licence, base, tags, gallery and measured rewards.

    Args:
        record: the run's facts.
        directory: the card's folder, which names a model that has no repository yet.
        images: file name and prompt of the gallery.
        results: what was measured.
    """
    optional: dict[str, Any] = {
        "license": record.license,
        "license_name": record.license_name,
        "license_link": record.license_link,
        "datasets": list(record.datasets) or None,
    }
    if base_kind(record.base_model) == "hub":
        # Anything but a Hub id here would be a dead link on the adapter's page.
        optional |= {"base_model": record.base_model, "base_model_relation": "adapter"}
    if images:
        optional["widget"] = [{"text": prompt, "output": {"url": name}} for name, prompt in images]
    if results:
        optional["model_name"] = (record.repo_id or directory.resolve().name).rsplit("/", 1)[-1]
        optional["eval_results"] = [_eval_result(record, result) for result in results]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=record.pipeline_tag,
        inference=True,
        tags=_tags(record),
        **{key: value for key, value in optional.items() if value is not None},
    )


def _tags(record: RunRecord) -> list[str]:
    is_rlr = str(record.config.get("estimator", "")).startswith("rlr")
    own = [*(["rlr"] if is_rlr else []), *(["diffusive-chain-of-thought"] if record.stages else [])]
    return list(dict.fromkeys([record.pipeline_tag, *COMMON_TAGS, *own, *record.tags]))


def _eval_result(record: RunRecord, result: Result) -> EvalResult:
    return EvalResult(
        task_type=record.pipeline_tag,
        dataset_type="prompts",
        dataset_name=record.evaluation_prompts,
        metric_type=result.name,
        metric_name=f"{result.name} ({result.role})",
        metric_value=round(result.after, 6),
    )


EDITED = "README.edited.md"


def write_card(directory: Path, card: StoredCard) -> Path:
    """Writes `run_record.json` and `README.md` into the folder; returns the path of the card.

    A card that was edited by hand since is kept as `README.edited.md`.
    """
    _keep_edited(directory)
    path = write_model_card(directory, record=card.record, template=card.template, extra_text=card.extra_text)
    save_stored_card(directory, replace(card, readme_sha256=_sha256(path)))
    return path


def card_text(directory: Path, card: StoredCard) -> str:
    """What `write_card` would write into `README.md`."""
    return render_card(directory, record=card.record, template=card.template, extra_text=card.extra_text)


def stored_record(directory: Path) -> RunRecord | None:
    """The facts of the run in this folder; None if it has none, as the folder of a checkpoint."""
    return load_stored_card(directory).record if (directory / RECORD_NAME).exists() else None


def addressed_card(directory: Path, repo_id: str, revision: str | None = None) -> StoredCard | None:
    """The folder's card with a snippet that loads from this repository, and this branch of it; nothing is written.

    None where the card stays as it is: it was edited by hand, is not from here, or names the place already.
    """
    readme = directory / "README.md"
    if not (directory / RECORD_NAME).exists() or not readme.exists():
        return None
    card = load_stored_card(directory)
    if (card.record.repo_id, card.record.hub_revision) == (repo_id, revision):
        return None
    if _sha256(readme) != card.readme_sha256:
        logger.warning("%s was edited: it is published as it is; its snippet may name another place.", readme)
        return None
    return replace(card, record=replace(card.record, repo_id=repo_id, hub_revision=revision))


def _keep_edited(directory: Path) -> None:
    readme = directory / "README.md"
    if not readme.exists() or not (directory / RECORD_NAME).exists():
        return
    try:
        written = load_stored_card(directory).readme_sha256
    except RecordError:  # of another version: whether it was edited is not known
        written = None
    if _sha256(readme) != written:
        os.replace(readme, directory / EDITED)
        logger.warning("%s was edited by hand: that card is now %s.", readme, EDITED)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
