"""The model card: `README.md` beside the adapter, filled from what the run measured and nothing else.

Its words are in `model_card_template.md`, its facts in the run's record. It is written, written again, and addressed to
a repository, without losing a user's edits.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from threading import Thread
from time import process_time
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import TemplateError as JinjaError
from jinja2 import nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from yaml import YAMLError

from rlr_peft.config.files import yaml_text
from rlr_peft.errors import UserError
from rlr_peft.files import replacing_file, sha256_of, stays_inside
from rlr_peft.foreign_text import fenced, in_cell, in_code, listed, one_line, printable, printable_values
from rlr_peft.publishing.record import (
    RECORD_NAME,
    ImagePair,
    License,
    RecordError,
    Rewards,
    RunRecord,
    StoredCard,
    base_kind,
    hub_link,
    load_stored_card,
    save_stored_card,
)
from rlr_peft.publishing.snippet import usage_snippet
from rlr_peft.redaction import redacted
from rlr_peft.reports import decimals_of, decimals_of_scores, direction, duration, half_width, with_error

logger = logging.getLogger(__name__)

RENDERING_SECONDS = 10.0  # of processor time: a template may be somebody else's; the shipped one takes milliseconds
EDITED = "README.edited.md"
COMMON_TAGS = ("diffusers", "diffusers-training", "lora", "template:sd-lora", "reward-fine-tuning")
KEYS = ("before", "before_se", "after", "after_se", "gain", "gain_se")


class TemplateError(UserError, ValueError):
    """A user's template that cannot be rendered."""


def default_template_path() -> Path:
    """`model_card_template.md` as shipped inside the package.

    In the repository this is a link to the file of the same name at the top level; a built package holds a copy.
    """
    return Path(__file__).parent / "model_card_template.md"


def write_card(directory: Path, card: StoredCard) -> Path:
    """Writes `run_record.json` and `README.md` into the folder; returns the path of the card.

    A card that was edited by hand since is kept as `README.edited.md`.
    """
    text = card_text(directory, card)
    path = directory / "README.md"
    _keep_edited(directory)
    with replacing_file(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")
    save_stored_card(directory, replace(card, readme_sha256=sha256_of(path)))
    return path


def card_text(directory: Path, card: StoredCard) -> str:
    """What `write_card` writes into `README.md`, with access tokens and passwords in URLs crossed out.

    Args:
        directory: the folder of the adapter. Images named in the record that are not there are left out.
        card: the facts. Its template gets the same variables and filters as the shipped one and, like that, is rendered
            in Jinja's sandbox, since one that is stored with a run may be somebody else's: it reaches these variables,
            and neither Python nor files. Its time is not limited.

    Raises:
        TemplateError: the template is no Jinja2, names what is not there, or gives metadata that cannot be read.
    """
    record, images = card.record, card.record.images
    before_after = images.before_after if _is_there(directory, images.before_after) else None
    gallery = [(name, prompt) for name, prompt in images.gallery if _is_there(directory, name)]
    conditioned = [pair.prompt for pair in images.pairs if pair.condition]
    prompts = [*conditioned, *(prompt for _, prompt in gallery), *images.before_after_prompts, *record.prompts.shown]
    if not gallery and before_after:
        # The gallery wants one prompt with its image; the figure shows several.
        gallery = [(before_after, next(iter(images.before_after_prompts), "base and adapter side by side"))]
    # Programs read the metadata and undo what is written out in quotes there: those values are printable themselves.
    shown = printable_values(dataclasses.asdict(record))
    results = [printable_values(result) for result in results_of(record)]
    metadata = _metadata(record, directory, gallery, results)
    variables = {
        **shown,
        **names_in_words(record),
        "results": results,
        "gallery": gallery,
        "before_after": before_after and quote(before_after),
        "reward_curve": quote(images.reward_curve or "") if _is_there(directory, images.reward_curve) else None,
        "pairs": _pairs(
            [pair for pair in images.pairs if _is_there(directory, pair.base) and _is_there(directory, pair.adapter)]
        ),
        "has_page": (directory / "compare.html").is_file(),
        "has_scores": (directory / "scores.parquet").is_file(),
        "extra_text": card.extra_text.strip() if card.extra_text else None,
        "snippet": usage_snippet(record, next(iter(prompts), "a photo of a cat")),
    }
    template = card.template or default_template_path().read_text(encoding="utf-8")
    return render_template(template, metadata, variables)


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
    adapter = card.record.adapter
    if (adapter.repo_id, adapter.revision) == (repo_id, revision):
        return None
    if sha256_of(readme) != card.readme_sha256:
        logger.warning("%s was edited: it is published as it is; its snippet may name another place.", readme)
        return None
    return replace(card, record=replace(card.record, adapter=replace(adapter, repo_id=repo_id, revision=revision)))


def results_of(record: RunRecord) -> list[dict[str, Any]]:
    """Every reward whose numbers are complete: the trained one, its parts, and the held-out ones, in this order.

    Returns:
        For each: `name`, `role` in words, `held_out` (only measured), `is_score` (what training raised, or the first
        held-out reward), `sign` (1 or -1 where the interval of the gain is clear of 0, else 0), `value` of the adapter,
        `gain` with its error, and the `cells` of the table, whose numbers do not break across lines.
    """
    metrics, found = record.metrics, []
    for prefix in (key.removesuffix("_gain") for key in metrics if key.endswith("_gain")):
        described = _described(record.rewards, prefix)
        if described is None or "n" not in metrics or any(f"{prefix}_{key}" not in metrics for key in KEYS):
            continue
        order, name, role = described
        before, before_se, after, after_se, gain, gain_se = (float(metrics[f"{prefix}_{key}"]) for key in KEYS)
        # Images of one prompt are alike, and the errors take them together; of a single prompt every image counts.
        prompts = int(metrics.get("prompts", metrics["n"]))
        count = prompts if prompts > 1 else int(metrics["n"])
        margin, places = half_width(gain_se, count), decimals_of(gain_se)
        low, high = (f"{edge:+.{places}f}" for edge in (gain - margin, gain + margin))
        win_rate = metrics.get(f"{prefix}_win_rate")
        cells = {
            "before": with_error(before, before_se),
            "after": with_error(after, after_se),
            "gain": f"{gain:+.{places}f} [{low}, {high}]",
            "win_rate": "" if win_rate is None else f"{win_rate:.0%}",
            "n": f"{metrics['n']:.0f}",
        }
        result = {
            "name": name,
            "role": role,
            "held_out": order == 2,
            "is_score": prefix in ("reward", "heldout"),
            "sign": direction(gain, gain_se, count),
            "value": after,
            "gain": with_error(gain, gain_se, sign=True),
            "cells": {key: cell.replace(" ", "\N{NO-BREAK SPACE}") for key, cell in cells.items()},
        }
        found.append((order, result))
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def _described(rewards: Rewards, prefix: str) -> tuple[int, str, str] | None:
    """Order, name and role of a prefix of `metrics.json`; None for what stands in the table already, or is no reward.

    What rewards tell beside their scores, such as the attributes that a judge saw, is on the comparison's page.
    """
    group, _, name = prefix.partition("/")
    if prefix == "reward":
        return 0, rewards.name, "trained on, weighted sum of scaled rewards" if rewards.weights else "trained on"
    if prefix == "heldout" and rewards.heldout:
        return 2, rewards.heldout[0], "held out"
    if group == "reward" and name in rewards.weights:
        return 1, name, f"trained on, weight {rewards.weights[name]:g}"
    if group == "heldout" and name in rewards.heldout[1:]:
        return 2, name, "held out"
    return None


def _metadata(
    record: RunRecord, directory: Path, gallery: Sequence[tuple[str, str]], results: Sequence[Mapping[str, Any]]
) -> ModelCardData:
    """What the Hub reads: licence, base, tags, gallery and measured rewards."""
    base = record.base
    is_rlr = str(record.config.get("estimator", "")).startswith("rlr")
    own = [*(["rlr"] if is_rlr else []), *(["diffusive-chain-of-thought"] if record.prompts.stages else [])]
    optional: dict[str, Any] = {"inference": True, "datasets": list(record.prompts.datasets) or None}
    if base_kind(base.model) == "hub":
        # Anything but a Hub id here would be a dead link on the adapter's page.
        optional |= {"base_model": base.model, "base_model_relation": "adapter"}
    if gallery:
        optional["widget"] = [{"text": prompt, "output": {"url": name}} for name, prompt in gallery]
    metadata = card_metadata(base.pipeline_tag, [*COMMON_TAGS, *own, *base.tags], base.license, **optional)
    if results:
        metadata.model_name = (record.adapter.repo_id or directory.resolve().name).rsplit("/", 1)[-1]
        metadata.eval_results = [
            EvalResult(
                task_type=base.pipeline_tag,
                dataset_type="prompts",
                dataset_name=printable(record.prompts.evaluation),
                metric_type=result["name"],
                metric_name=f"{result['name']} ({result['role']})",
                metric_value=round(result["value"], 6),
            )
            for result in results
        ]
    return metadata


def card_metadata(pipeline_tag: str, tags: Sequence[str], licence: License, **others: Any) -> ModelCardData:
    """A card's metadata; what is None is left out."""
    given = {"license": licence.id, "license_name": licence.name, "license_link": licence.link, **others}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=printable(pipeline_tag),
        tags=printable_values(list(dict.fromkeys([pipeline_tag, *tags]))),
        **{name: printable_values(value) for name, value in given.items() if value is not None},
    )


def names_in_words(record: RunRecord) -> dict[str, str]:
    """What is trained on what."""
    model, kind = printable(record.base.model), base_kind(record.base.model)
    label = Path(model).name if kind == "folder" else model
    names = printable_values(list(record.rewards.weights) or [record.rewards.name])
    rewards = "reward" if len(names) == 1 else "rewards"
    base_text = {
        "embedded": "`tiny-shapes`, the small pipeline that ships with rlr-peft",
        "folder": f"the local pipeline {in_code(label)}",
        "hub": hub_link(label),
    }
    return {
        "title": in_cell(f"{listed(names)} LoRA for {label.rsplit('/', 1)[-1]}".strip()),
        "base_text": base_text[kind],
        "reward_text": f"the {rewards} {listed([in_code(name) for name in names])}",
    }


def _pairs(pairs: Sequence[ImagePair]) -> list[dict[str, str]]:
    decimals = decimals_of_scores([0.0, *(score for pair in pairs for score in (pair.base_score, pair.adapter_score))])
    return [
        {
            "prompt": pair.prompt,
            "base": quote(pair.base),
            "condition": quote(pair.condition or ""),
            "adapter": quote(pair.adapter),
            "base_score": f"{pair.base_score:.{decimals}f}",
            "adapter_score": f"{pair.adapter_score:.{decimals}f}",
        }
        for pair in pairs
    ]


def render_template(template: str, metadata: ModelCardData, variables: Mapping[str, Any]) -> str:
    """The text of a card; in the template a misspelt name, which would be an empty place on the card, is an error.

    Raises:
        TemplateError: see `card_text`.
    """
    given = {**metadata.to_dict(), **variables, "card_data": metadata.to_yaml()}
    try:
        sandbox = _Sandbox()
        sandbox.filters |= FILTERS
        parsed = sandbox.parse(template)
        own = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"}  # those of `set` in an `if`
        unknown = sorted(find_undeclared_variables(parsed) - given.keys() - own)
        if not unknown:
            card = ModelCard(_in_time(lambda: sandbox.from_string(template).render(given)))
            return printable(redacted(f"{str(card).rstrip()}\n"))
    except (JinjaError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, YAMLError) as error:
        raise TemplateError(f"The template of the card cannot be rendered ({error}); correct it.") from error
    except (TimeoutError, RecursionError) as error:
        why = f"it takes more than {RENDERING_SECONDS:g} s of work" if isinstance(error, TimeoutError) else error
        raise TemplateError(f"The template of the card cannot be rendered ({why}); correct it.") from error
    near = [match for name in unknown for match in get_close_matches(name, given, 1)]
    meant = f" Did you mean {listed(near)}?" if near else f" Its variables are {', '.join(sorted(variables))}."
    raise TemplateError(f"The template of the card names what is not there: {listed(unknown)}.{meant}")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses also the arithmetic of which one operation, which nothing interrupts, could take hours."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or any(isinstance(value, int) and abs(value) >= 2**64 for value in (left, right)):
            raise SecurityError(f"a template's {operator} of such numbers may take too long")
        return super().call_binop(context, operator, left, right)


def _in_time(render: Callable[[], str]) -> str:
    """What it returns or raises; a TimeoutError after `RENDERING_SECONDS`, and its thread ends with the program.

    The clock is the process's own: on a busy machine the shipped template, too, has waited ten seconds for its turn.
    """
    rendered: Future[str] = Future()

    def run() -> None:
        try:
            rendered.set_result(render())
        except BaseException as error:
            rendered.set_exception(error)

    begin = process_time()
    Thread(target=run, daemon=True).start()
    while not wait([rendered], timeout=0.1).done:
        if process_time() - begin > RENDERING_SECONDS:
            raise TimeoutError
    return rendered.result()


def _in_lines(command: str) -> str:
    """The command with a line for every flag."""
    try:
        words = shlex.split(command)
    except ValueError:  # of a record that somebody has changed
        return command
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(map(shlex.join, lines))


# What templates write values with, in addition to Jinja's own filters.
FILTERS = {
    "cell": in_cell,
    "code": in_code,
    "line": one_line,
    "in_lines": _in_lines,
    "fenced": fenced,
    "yaml": lambda values: yaml_text(values).rstrip(),
    "in_a_row": listed,
    "number": lambda value: f"{value:g}",
    "count": lambda value: f"{value:,.0f}",
    "percent": lambda share: f"{share:.0%}",
    "duration": duration,
    "with_error": with_error,
}


def _is_there(directory: Path, name: str | None) -> bool:
    if name is not None and not (stays_inside(name) and (directory / name).is_file()):
        logger.warning("The model card leaves out %s: there is no such file in %s", name, directory)
        return False
    return name is not None


def _keep_edited(directory: Path) -> None:
    readme = directory / "README.md"
    if not readme.exists() or not (directory / RECORD_NAME).exists():
        return
    try:
        written = load_stored_card(directory).readme_sha256
    except RecordError:  # of another version: whether it was edited is not known
        written = None
    if sha256_of(readme) != written:
        os.replace(readme, directory / EDITED)
        logger.warning("%s was edited by hand: that card is now %s.", readme, EDITED)
