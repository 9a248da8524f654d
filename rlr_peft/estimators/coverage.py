"""Coverage: the expected weight with which the terms of an estimator cover every step.

An estimator is unbiased when every step's expected weight is 1; a step below 1 biases it, and that must be a choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rlr_peft.errors import UserError


class CoverageError(UserError, ValueError):
    """An estimator's terms do not cover the chain as they claim."""


@dataclass(frozen=True)
class Coverage:
    """Expected weight of every step and the reasons where it is not 1.

    Attributes:
        weights: ``weights[t - 1]`` is the expected weight of step t, (T,), float64.
        gaps: reason by step for every step that is left out by choice.
        smoothing: scale s of the zeroth order's perturbation where there is one: its gradient is that of the smoothed
            objective, biased in the order of s squared; None without it.
        departures: what makes the estimate another than the gradient of the expected reward although steps are covered,
            one clause each.
    """

    weights: torch.Tensor
    gaps: Mapping[int, str]
    smoothing: float | None = None
    departures: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every step is covered with expected weight 1."""
        return bool(torch.allclose(self.weights, torch.ones_like(self.weights), rtol=0, atol=1e-9))

    @property
    def unbiased(self) -> bool:
        """Whether the estimate is unbiased: every step covered, nothing smoothed, no departure."""
        return self.complete and self.smoothing is None and not self.departures

    def check(self) -> None:
        """Raises:
        CoverageError: a step's weight is not 1 and no reason was given.
        """
        for t, weight in enumerate(self.weights.tolist(), start=1):
            if abs(weight - 1) > 1e-9 and t not in self.gaps:
                raise CoverageError(f"Expected coverage 1 at step {t} of {len(self.weights)}, got {weight:.6g}.")

    def describe(self) -> str:
        """One or two sentences for logs and cards."""
        if self.unbiased:
            return "Every step is covered with expected weight 1: the gradient estimate is unbiased."
        clauses = list(self.departures)
        if self.smoothing is not None:
            smoothed = (
                "the zeroth-order term estimates the gradient of the objective smoothed at "
                f"s = {self.smoothing:g}, with a bias of order s squared"
            )
            if self.complete and not self.departures:
                return f"Every step is covered with expected weight 1; {smoothed}."
            clauses.append(smoothed)
        off = [t for t, weight in enumerate(self.weights.tolist(), start=1) if abs(weight - 1) > 1e-9]
        for reason in sorted({self.gaps[t] for t in off if t in self.gaps}):
            steps = [t for t in off if self.gaps.get(t) == reason]
            subject, verb = ("step", "is") if len(steps) == 1 else ("steps", "are")
            clauses.append(f"{subject} {step_ranges(steps)} of {len(self.weights)} {verb} {reason}")
        return f"Biased by choice: {'; '.join(clauses)}."


def step_ranges(steps: list[int]) -> str:
    """Steps in words, runs of them joined: ``1-3, 7``."""
    parts: list[list[int]] = []
    for t in steps:
        if parts and t == parts[-1][-1] + 1:
            parts[-1].append(t)
        else:
            parts.append([t])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
