"""What the RLR estimator is made of: its terms, and the factor of each."""

from dataclasses import dataclass
from typing import Literal

from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.zeroth_order import ZerothOrder


@dataclass(frozen=True)
class Coefficients:
    """Factor of each term; anything but 1 is a choice of bias.

    Attributes:
        first_order: of the pathwise gradient.
        half_order: of the score terms, those of the black-box tail among them.
        zeroth_order: of the perturbation term.
    """

    first_order: float = 1.0
    half_order: float = 1.0
    zeroth_order: float = 1.0


@dataclass(frozen=True)
class RLRSettings:
    """What the estimator is made of.

    Attributes:
        first_order_steps: K; "auto" for the measured choice, "random" for a uniform draw in 1..T for every micro-batch.
        half_order: blocks beyond K; None leaves them to the zeroth order or uncovered.
        zeroth_order: covers what the other terms leave over; None for nothing.
        black_box_steps: steps 1..n that get black-box tail terms when the reward has no gradient.
        step_choice: what "auto" measures: one K, or a weight for every step that mixes both terms.
        state_baseline: take the reward of the predicted image off the advantages of the score terms.
        coefficients: factor of each term.
    """

    first_order_steps: int | Literal["auto", "random"] = "auto"
    half_order: HalfOrder | None = HalfOrder(length=1, blocks="all")
    zeroth_order: ZerothOrder | None = None
    black_box_steps: int = 0
    step_choice: Literal["crossing", "inverse-variance"] = "crossing"
    state_baseline: bool = False
    coefficients: Coefficients = Coefficients()

    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards; `has_gradient` is the reward's, None where that is not known."""
        tail = []
        if has_gradient is not False and self.first_order_steps != 0:
            tail.append(self._describe_first_order())
        if not has_gradient and self.black_box_steps > 0:
            condition = " if the reward has no gradient" if has_gradient is None else ""
            tail.append(f"mirrored noises on the last {self.black_box_steps} step(s){condition}")
        terms = [", or ".join(tail)] if tail else []
        if self.half_order is not None:
            baseline = " and a state baseline" if self.state_baseline else ""
            terms.append(self.half_order.describe() + baseline)
        if self.zeroth_order is not None:
            terms.append(f"{self.zeroth_order.form} zeroth order with s = {self.zeroth_order.scale:g} on the rest")
        if self.coefficients != Coefficients():
            c = self.coefficients
            terms.append(f"coefficients {c.first_order:g}, {c.half_order:g}, {c.zeroth_order:g} of the three orders")
        return "; ".join(terms)

    def _describe_first_order(self) -> str:
        if self.first_order_steps == "auto" and self.step_choice == "inverse-variance":
            return "first and half order mixed at every step by their measured variances"
        k = {"auto": "K measured", "random": "K drawn from 1..T"}.get(
            str(self.first_order_steps), f"K = {self.first_order_steps}"
        )
        return f"first order on steps 1..K, {k}"
