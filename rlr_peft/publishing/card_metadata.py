"""The card's metadata: what the Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from rlr_peft.publishing.results import Result
from rlr_peft.publishing.run_record import RunRecord
from rlr_peft.publishing.usage_snippet import base_kind

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
