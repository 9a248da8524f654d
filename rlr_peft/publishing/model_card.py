"""The model card: `README.md` beside the adapter, filled from what the run measured and nothing else."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from rlr_peft.durable_files import replacing_file
from rlr_peft.publishing.run_record import RunRecord
from rlr_peft.publishing.usage_snippet import base_kind, usage_snippet

logger = logging.getLogger(__name__)

COMMON_TAGS = ("diffusers", "diffusers-training", "lora", "template:sd-lora", "reward-fine-tuning")
MAX_PROMPTS = 10
# The claim "rose" or "fell" is made from this many paired standard errors on.
CLEAR_STANDARD_ERRORS = 2.0
RESULT_KEYS = ("before", "before_se", "after", "after_se", "gain", "gain_se")


def default_template_path() -> Path:
    """`model_card_template.md` as shipped inside the package.

    In the repository this is a link to the file of the same name at the top level; a built package holds a copy.
    """
    return Path(__file__).parent / "model_card_template.md"


def write_model_card(directory: Path, *, record: RunRecord, template_path: Path | None = None) -> Path:
    """Write `directory/README.md`, replacing what is there.

    Args:
        directory: the folder of the adapter. Images named in the record that are not there are left out.
        record: the facts of the run.
        template_path: a Jinja2 template in place of the shipped one.

    Returns:
        The path of the card.
    """
    directory = Path(directory)
    images = [(name, prompt) for name, prompt in record.images if _is_there(directory, name)]
    before_after = record.before_after if _is_there(directory, record.before_after) else None
    reward_curve = record.reward_curve if _is_there(directory, record.reward_curve) else None
    known_prompts = [*(prompt for _, prompt in images), *record.before_after_prompts, *record.prompts]
    snippet_prompt = next(iter(known_prompts), "a photo of a cat")
    if not images and before_after:
        # The gallery wants one prompt with its image; the figure shows several.
        images = [(before_after, next(iter(record.before_after_prompts), "base and adapter side by side"))]
    rows = _result_rows(record)
    kind = base_kind(record.base_model)
    label = Path(record.base_model).name if kind == "folder" else record.base_model
    base_text = {
        "embedded": "`tiny-shapes`, the small pipeline that ships with rlr-peft",
        "folder": f"the local pipeline `{label}`",
        "hub": f"[{label}](https://huggingface.co/{label})",
    }[kind]
    shown_prompts = list(record.prompts[:MAX_PROMPTS])
    card = ModelCard.from_template(
        _card_data(record, directory, images),
        template_path=str(template_path or default_template_path()),
        title=f"LoRA of {label.rsplit('/', 1)[-1]} for the reward {record.reward_name}",
        has_gallery=bool(images),
        base_text=base_text,
        reward_name=record.reward_name,
        heldout_name=record.heldout_name if any(row["role"] == "held out" for row in rows) else None,
        verdicts=_verdicts(record),
        snippet=fenced(usage_snippet(record, snippet_prompt), "python"),
        snippet_note=None if record.repo_id else "In the folder of this file:",
        result_rows=rows,
        evaluation=record.evaluation,
        before_after=before_after,
        reward_curve=reward_curve,
        estimator_text=" ".join([*record.estimator, *([record.coverage] if record.coverage else [])]),
        facts=_facts(record),
        stages=[
            {"name": name, "share": f"{share:.0%}", "prompt": prompt}
            for (name, share), prompt in zip(record.stages.items(), record.stage_prompts or [""] * len(record.stages))
        ],
        command=fenced(record.command, "bash") if record.command else None,
        config=fenced(yaml_dump(dict(record.config), sort_keys=False).rstrip(), "yaml"),
        prompts=fenced("\n".join(shown_prompts), "text") if shown_prompts else None,
        prompts_introduction=(
            f"The first {len(shown_prompts)} of its {len(record.prompts)} training prompts:"
            if len(record.prompts) > len(shown_prompts)
            else "Its training prompts:"
        ),
    )
    path = directory / "README.md"
    with replacing_file(path) as aside:
        aside.write_text(f"{str(card).rstrip()}\n", encoding="utf-8", newline="\n")
    return path


def with_error(mean: float, standard_error: float, *, sign: bool = False) -> str:
    """`0.613 ± 0.012`: two digits of the standard error, and the mean to the same place."""
    decimals = 4
    if standard_error > 0:
        decimals = max(0, 1 - math.floor(math.log10(standard_error)))
    return f"{mean:{'+' if sign else ''}.{decimals}f} ± {standard_error:.{decimals}f}"


def fenced(text: str, language: str) -> str:
    """A Markdown code block whose fence is longer than any row of backticks inside."""
    longest = max((len(row) for row in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _is_there(directory: Path, name: str | None) -> bool:
    if name is not None and not (directory / name).is_file():
        logger.warning("The model card leaves out %s: there is no such file in %s", name, directory)
        return False
    return name is not None


def _card_data(record: RunRecord, directory: Path, images: list[tuple[str, str]]) -> ModelCardData:
    optional: dict[str, Any] = {
        "license": record.license,
        "license_name": record.license_name,
        "license_link": record.license_link,
    }
    if base_kind(record.base_model) == "hub":
        # Anything but a Hub id here would be a dead link on the adapter's page.
        optional |= {"base_model": record.base_model, "base_model_relation": "adapter"}
    if images:
        optional["widget"] = [{"text": prompt, "output": {"url": name}} for name, prompt in images]
    measured = [prefix for prefix in ("reward", "heldout") if _results(record, prefix)]
    if measured:
        names = {"reward": record.reward_name, "heldout": record.heldout_name or "held-out reward"}
        optional["model_name"] = (record.repo_id or directory.resolve().name).rsplit("/", 1)[-1]
        optional["eval_results"] = [
            EvalResult(
                task_type=record.pipeline_tag,
                dataset_type="prompts",
                dataset_name=record.evaluation_prompts,
                metric_type=names[prefix],
                metric_name=f"{names[prefix]} ({_ROLES[prefix]})",
                metric_value=round(record.metrics[f"{prefix}_after"], 6),
            )
            for prefix in measured
        ]
    is_rlr = str(record.config.get("estimator", "")).startswith("rlr")
    own = [*(["rlr"] if is_rlr else []), *(["diffusive-chain-of-thought"] if record.stages else [])]
    tags = [record.pipeline_tag, *COMMON_TAGS, *own, *record.tags]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=record.pipeline_tag,
        inference=True,
        tags=list(dict.fromkeys(tags)),
        **{key: value for key, value in optional.items() if value is not None},
    )


_ROLES = {"reward": "trained on", "heldout": "held out"}


def _results(record: RunRecord, prefix: str) -> Mapping[str, float] | None:
    keys = [f"{prefix}_{key}" for key in RESULT_KEYS]
    if "n" not in record.metrics or any(key not in record.metrics for key in keys):
        return None
    return {key: record.metrics[f"{prefix}_{key}"] for key in RESULT_KEYS}


def _result_rows(record: RunRecord) -> list[dict[str, str]]:
    rows = []
    for prefix, name in (("reward", record.reward_name), ("heldout", record.heldout_name)):
        results = _results(record, prefix)
        if results and name:
            rows.append(
                {
                    "name": name,
                    "role": _ROLES[prefix],
                    "before": with_error(results["before"], results["before_se"]),
                    "after": with_error(results["after"], results["after_se"]),
                    "gain": with_error(results["gain"], results["gain_se"], sign=True),
                    "n": f"{record.metrics['n']:.0f}",
                }
            )
    return rows


def _verdicts(record: RunRecord) -> list[str]:
    """What the paired gains say, in words, and a plain warning when they say that the reward was hacked."""
    signs = {}
    sentences = []
    for prefix, name in (("reward", record.reward_name), ("heldout", record.heldout_name)):
        results = _results(record, prefix)
        if not results or not name:
            continue
        gain, error = results["gain"], results["gain_se"]
        signs[prefix] = 0 if abs(gain) <= CLEAR_STANDARD_ERRORS * error else int(math.copysign(1, gain))
        verb = {1: "rose", -1: "fell", 0: "did not change measurably"}[signs[prefix]]
        what = "its reward" if prefix == "reward" else f"the held-out reward `{name}`, never trained on,"
        sentences.append(f"On {record.evaluation_prompts} {what} {verb} ({with_error(gain, error, sign=True)}).")
    if signs.get("reward") == 1 and signs.get("heldout") == -1:
        sentences.append("**The two disagree: this adapter probably exploits a flaw of its reward.**")
    return sentences


def _facts(record: RunRecord) -> list[dict[str, str]]:
    metrics = record.metrics
    facts: dict[str, str | None] = {
        "hardware": record.hardware,
        "time": _duration(metrics["seconds"]) if "seconds" in metrics else None,
        "peak memory": f"{metrics['peak_memory_mb']:,.0f} MB" if "peak_memory_mb" in metrics else None,
        "denoiser evaluations": (
            f"{metrics['denoiser_evaluations']:,.0f}" if "denoiser_evaluations" in metrics else None
        ),
        "packages": ", ".join(f"{name} {version}" for name, version in record.versions.items()) or None,
        "commit of rlr-peft": f"`{record.commit}`" if record.commit else None,
    }
    return [{"name": name, "value": value} for name, value in facts.items() if value]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
