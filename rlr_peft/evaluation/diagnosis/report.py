"""The report: a page that needs nothing but itself, all numbers as JSON, and the figure."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup, escape

from rlr_peft.config import config_to_dict
from rlr_peft.durable_files import replacing_file
from rlr_peft.evaluation.diagnosis.diagnosis import Diagnosis, MethodResult
from rlr_peft.evaluation.diagnosis.figure import save_step_profile
from rlr_peft.evaluation.diagnosis.profile import StepProfile
from rlr_peft.evaluation.diagnosis.recommendation import Recommendation
from rlr_peft.evaluation.diagnosis.statistics import gradient_norm, signal_to_noise
from rlr_peft.evaluation.diagnosis.table import PARTS, column_titles, notes, row_of
from rlr_peft.foreign_text import page_environment, printable
from rlr_peft.redaction import redacted, redacted_values

TEMPLATE = "report.html.j2"


def write_report(path: Path, diagnosis: Diagnosis, recommendation: Recommendation) -> list[Path]:
    """Writes the page, and beside it the same name with .json and .png.

    Args:
        path: of the page, ending in ``.html``.
        diagnosis: what was measured.
        recommendation: what follows.

    Returns:
        The three paths.
    """
    picture = save_step_profile(path.with_suffix(".png"), diagnosis)
    numbers = path.with_suffix(".json")
    with replacing_file(numbers) as aside:
        aside.write_text(
            json.dumps(redacted_values(plain_numbers(diagnosis, recommendation)), indent=2, allow_nan=False) + "\n",
            encoding="utf-8",
        )
    with replacing_file(path) as aside:
        aside.write_text(redacted(page(diagnosis, recommendation, picture.read_bytes())), encoding="utf-8")
    return [path, numbers, picture]


def page(diagnosis: Diagnosis, recommendation: Recommendation, picture: bytes) -> str:
    """The HTML; ``picture`` is a PNG that is put inside."""
    environment = page_environment(Path(__file__).parent)
    environment.filters["code"] = _with_code
    return environment.get_template(TEMPLATE).render(
        facts=diagnosis.facts,
        flags=recommendation.flags,
        advice=recommendation.advice,
        parts=PARTS,
        titles=column_titles(diagnosis),
        rows=[row_of(result) for result in diagnosis.results],
        coverage=[(result.method, result.coverage.describe()) for result in diagnosis.results],
        left_out=diagnosis.comparison.left_out,
        notes=notes(diagnosis),
        stages=[stage for stage in diagnosis.profile.stages if stage.energy_share is not None],
        picture=base64.b64encode(picture).decode("ascii"),
    )


def _with_code(text: str) -> Markup:
    """Words between backticks as code; everything else is escaped."""
    parts = printable(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )


def plain_numbers(diagnosis: Diagnosis, recommendation: Recommendation) -> dict[str, Any]:
    """All numbers in plain types; null where a number does not exist or is infinite."""
    evidence, comparison = diagnosis.evidence, diagnosis.comparison
    return {
        "facts": dict(diagnosis.facts),
        "config": config_to_dict(diagnosis.config),
        "num_steps": evidence.num_steps,
        "num_samples": evidence.num_samples,
        "samples_per_prompt": evidence.group_size,
        "differentiable": evidence.differentiable,
        "rewards": _plain(evidence.rewards),
        "first_order_steps": comparison.first_order_steps if evidence.differentiable else None,
        "black_box_steps": None if evidence.differentiable else comparison.black_box_steps,
        "reference": diagnosis.reference.method.name,
        "memory": diagnosis.memory,
        "cost_samples": diagnosis.cost_samples,
        "methods": [_plain_method(result) for result in diagnosis.results],
        "left_out": dict(comparison.left_out),
        "profile": _plain_profile(diagnosis.profile),
        "recommendation": {"flags": recommendation.flags, "advice": dict(recommendation.advice)},
    }


def _plain_method(result: MethodResult) -> dict[str, Any]:
    method, cost, estimates = result.method, result.cost, result.estimates
    return {
        "name": method.name,
        "flags": method.flags,
        "terms": method.estimator.describe(),
        "coverage": result.coverage.describe(),
        "coverage_weights": result.coverage.weights.tolist(),
        "unbiased": result.coverage.unbiased,
        "own_units": method.own_units,
        "samples": len(estimates.samples),
        "denoiser_evaluations": cost.denoiser_evaluations,
        "backward_passes": cost.backward_passes,
        "cost": cost.work,
        "seconds": cost.seconds,
        "peak_bytes": cost.peak_bytes,
        "added_bytes": cost.added_bytes,
        "gradient_norm": gradient_norm(estimates),
        "variance": estimates.variance,
        "variance_se": estimates.variance_error,
        "variance_times_cost": result.variance_times_cost,
        "variance_times_cost_se": estimates.variance_error * cost.work,
        "signal_to_noise": signal_to_noise(estimates),
        "cosine": result.cosine.value,
        "cosine_low": result.cosine.low,
        "cosine_high": result.cosine.high,
    }


def _plain_profile(profile: StepProfile) -> dict[str, Any]:
    return {
        "steps": list(range(1, profile.num_steps + 1)),
        "energy": _plain(profile.energy),
        "signal": _plain(profile.signal),
        "first_order_variance": _plain(profile.first_order),
        "half_order_variance": _plain(profile.half_order),
        "black_box_variance": _plain(profile.black_box),
        "has_noise": profile.has_noise.tolist(),
        "variance_by_first_order_steps": _plain(profile.by_first_order_steps),
        "hot_steps": {str(t): ratio for t, ratio in profile.hot_steps.items()},
        "last_step_sensitivity": profile.last_step_sensitivity,
        "last_step_is_dead": profile.last_step_is_dead,
        "stages": [vars(stage) for stage in profile.stages],
    }


def _plain(values: torch.Tensor | None) -> Any:
    """Nested lists of finite numbers and None."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(part) for part in value]
        return value if math.isfinite(value) else None

    return None if values is None else finite(values.tolist())
