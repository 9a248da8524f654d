"""Which methods are compared, what their estimates are, and which ones do not exist for this chain and reward."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from rlr_peft.config import EstimatorArguments
from rlr_peft.config.estimator import ReusedSamplesArguments
from rlr_peft.config.methods import METHODS, D3POArguments, RLRPaperArguments
from rlr_peft.diagnose import estimates as estimates_of
from rlr_peft.diagnose.estimates import SampleEstimates, sample_estimates
from rlr_peft.diagnose.evidence import Evidence
from rlr_peft.estimators.base import Estimator
from rlr_peft.estimators.layout import RLRSettings
from rlr_peft.estimators.presets import build_estimator
from rlr_peft.estimators.rlr import RLREstimator
from rlr_peft.estimators.variance import best_first_order_steps, inverse_variance_weights
from rlr_peft.estimators.zeroth_order import ZerothOrder

NUM_DRAWN_STEPS = 4
# Perturbations are so noisy that more of them would not change the picture, and each costs two chains.
MAX_ZEROTH_ORDER_SAMPLES = 8

# What a method sets, by the name of the flag.
Changes = dict[str, str | int]

NO_GRADIENT = "the reward has no gradient"
NO_NOISE = "the chain has no noise, so it has no score terms"


@dataclass(frozen=True)
class Method:
    """One way to estimate the gradient.

    Attributes:
        name: in the tables.
        flags: what selects it in training; empty where no flag does.
        estimator: what is run to measure its cost.
        estimates: those of single samples; None where only running it can tell.
        max_samples: how many samples to run it on at the most; None for all.
        own_units: whether its gradient is in other units than the reward's, so that variances cannot be compared.
    """

    name: str
    flags: str
    estimator: Estimator
    estimates: SampleEstimates | None = None
    max_samples: int | None = None
    own_units: bool = False


@dataclass(frozen=True)
class ComparedMethods:
    """The methods that exist here, and those that do not.

    Attributes:
        methods: what is compared.
        left_out: reason by name.
        first_order_steps: K of the method ``rlr``; 0 for a reward without gradient.
        black_box_steps: n of the method ``rlr``; 0 for a reward with a gradient.
    """

    methods: list[Method]
    left_out: dict[str, str]
    first_order_steps: int
    black_box_steps: int

    @property
    def covered_tail(self) -> int:
        """The last steps that the method ``rlr`` does not leave to plain score terms."""
        return max(self.first_order_steps, self.black_box_steps)


def methods_to_compare(evidence: Evidence, arguments: EstimatorArguments, seed: int) -> ComparedMethods:
    """Every method that exists for the chain and the reward, with its estimates on the same samples.

    Args:
        evidence: what was measured.
        arguments: lend the numbers that do not make a method another one, such as clips and scales.
        seed: of random draws of steps.
    """
    builder = _Builder(evidence, arguments, seed)
    if evidence.differentiable:
        builder.pathwise()
    else:
        builder.left_out |= dict.fromkeys(("full-bp", "truncated-bp", "refl", "rlr with measured K"), NO_GRADIENT)
        builder.black_box()
    if evidence.noisy_steps:
        builder.score_function()
    else:
        builder.left_out |= dict.fromkeys(("reinforce", "ddpo", "grpo", "d3po", "rlr with score terms"), NO_NOISE)
    builder.run_only()
    return ComparedMethods(builder.methods, builder.left_out, builder.first_order_steps, builder.black_box_steps)


class _Builder:
    """Collects methods."""

    def __init__(self, evidence: Evidence, arguments: EstimatorArguments, seed: int) -> None:
        self.evidence = evidence
        self.arguments = arguments
        self.generator = torch.Generator().manual_seed(seed)
        self.methods: list[Method] = []
        self.left_out: dict[str, str] = {}
        variances = evidence.variances
        self.first_order_steps = (
            best_first_order_steps(variances.first_order, variances.half_order) if evidence.differentiable else 0
        )
        self.black_box_steps = 0 if evidence.differentiable else best_black_box_steps(evidence)

    def pathwise(self) -> None:
        """Methods of a reward with a gradient."""
        gradients, num_steps, best = self.evidence.gradients, self.evidence.num_steps, self.first_order_steps
        self._add("full-bp", estimates_of.pathwise_tail(gradients, num_steps), {"estimator": "full-bp"})
        for k in sorted({1, math.ceil(num_steps / 4)}):
            tail = estimates_of.pathwise_tail(gradients, k)
            self._add(f"truncated-bp, K = {k}", tail, {"estimator": "truncated-bp", "fo_steps": k})
        crossing = estimates_of.first_and_half_order(gradients, best)
        self._add(f"rlr, K = {best} (measured)", crossing, {"estimator": "rlr"})
        weights = inverse_variance_weights(self.evidence.variances.first_order, self.evidence.variances.half_order)
        mixed = estimates_of.mixed_orders(gradients, weights)
        self._add("rlr, mixed orders", mixed, {"estimator": "rlr", "step_choice": "inverse-variance"})
        if self.evidence.noisy_steps:
            single = estimates_of.first_and_half_order(gradients, 1)
            self._add("rlr, K = 1", single, {"estimator": "rlr", "fo_steps": 1})
            self._drawn_steps(f"rlr, K = {best}", best, {"fo_steps": best})

    def black_box(self) -> None:
        """Methods of a reward without gradient."""
        evidence, chosen = self.evidence, self.black_box_steps
        if not evidence.noisy_steps:
            return
        tail = estimates_of.black_box_tail(evidence.gradients, evidence.mirrored[:chosen])
        name = f"rlr, black-box tail of {chosen} (measured)"
        self._add(name, tail, {"estimator": "rlr", "black_box_steps": chosen})
        self._drawn_steps("rlr, no black-box tail", 0, {"black_box_steps": 0})

    def _drawn_steps(self, name: str, tail: int, changes: Changes) -> None:
        gradients = self.evidence.gradients
        beyond, name = sum(t > tail for t in self.evidence.noisy_steps), f"{name}, {NUM_DRAWN_STEPS} drawn score terms"
        if beyond > NUM_DRAWN_STEPS:
            drawn = estimates_of.drawn_score_terms(gradients, tail, NUM_DRAWN_STEPS, self.generator)
            self._add(name, drawn, {"estimator": "rlr", **changes, "ho_blocks": NUM_DRAWN_STEPS})
        else:
            self.left_out[name] = (
                f"{beyond} of the steps are left for score terms, too few to draw {NUM_DRAWN_STEPS} from"
            )

    def score_function(self) -> None:
        """Methods of score terms alone, with their own advantages."""
        evidence = self.evidence
        for name in ("reinforce", "ddpo", "grpo"):
            estimator = build_estimator(self._arguments({"estimator": name}), evidence.num_steps)
            advantages = estimator.advantages(evidence.rewards, evidence.prompts, evidence.group_size)
            vectors = estimates_of.score_terms(evidence.gradients, advantages)
            self._add(name, vectors, {"estimator": name}, own_units=name != "reinforce")
        if evidence.group_size % 2 or evidence.micro_batch_size < 2:
            self.left_out["d3po"] = (
                f"it needs pairs, got num_images_per_prompt {evidence.group_size} and micro-batches of "
                f"{evidence.micro_batch_size}"
            )
            return
        dpo_beta = D3POArguments(**self.arguments.fine_knobs(of=D3POArguments)).dpo_beta
        # At the reference every pair's slope is beta / 2, whatever the margin of its rewards.
        first, second = evidence.rewards.reshape(-1, 2).T
        slope = torch.sign(first - second) * dpo_beta / 2
        vectors = estimates_of.score_terms(evidence.gradients, torch.stack([slope, -slope], dim=1).reshape(-1))
        self._add("d3po", vectors, {"estimator": "d3po"}, own_units=True)

    def run_only(self) -> None:
        """Methods that the sketches of single steps do not hold."""
        differentiable = self.evidence.differentiable
        if self.evidence.noisy_steps:
            tail: Changes = {"fo_steps": 1} if differentiable else {"black_box_steps": 0}
            name = "rlr, K = 1, blocks of h = 2" if differentiable else "rlr, no black-box tail, blocks of h = 2"
            if self.evidence.num_steps > 1:
                self._add(name, None, {"estimator": "rlr", **tail, "ho_length": 2})
            self._add("rlr-paper", None, {"estimator": "rlr-paper"}, max_samples=MAX_ZEROTH_ORDER_SAMPLES)
        paper = RLRPaperArguments(**self.arguments.fine_knobs(of=RLRPaperArguments))
        perturbed = ZerothOrder("two-point", paper.zo_scale)
        alone = RLREstimator(RLRSettings(first_order_steps=0, half_order=None, zeroth_order=perturbed))
        self.methods.append(Method("zeroth order on all steps", "", alone, max_samples=MAX_ZEROTH_ORDER_SAMPLES))
        if differentiable:
            self._add("refl", None, {"estimator": "refl"})

    def _add(
        self,
        name: str,
        estimates: SampleEstimates | torch.Tensor | None,
        changes: Changes,
        *,
        max_samples: int | None = None,
        own_units: bool = False,
    ) -> None:
        estimator = build_estimator(self._arguments(changes), self.evidence.num_steps)
        if isinstance(estimator, RLREstimator):
            estimator.statistics.variances = self.evidence.variances
        if isinstance(estimates, torch.Tensor):
            estimates = sample_estimates(estimates)
        flags = " ".join(f"--{knob} {value}" for knob, value in changes.items())
        self.methods.append(Method(name, flags, estimator, estimates, max_samples, own_units))

    def _arguments(self, changes: Changes) -> EstimatorArguments:
        """The method's own defaults, and what does not make it another method from the user's config."""
        method = METHODS[str(changes["estimator"])]
        own: dict[str, Any] = {knob: value for knob, value in changes.items() if knob != "estimator"}
        if issubclass(method, ReusedSamplesArguments):
            own["inner_epochs"] = 1
        return method(**self.arguments.fine_knobs(of=method) | own)


def best_black_box_steps(evidence: Evidence) -> int:
    """The length n of the black-box tail whose estimate has the smallest variance times cost, in 0..n tried."""
    scores = []
    for n in range(len(evidence.mirrored) + 1):
        estimates = sample_estimates(estimates_of.black_box_tail(evidence.gradients, evidence.mirrored[:n]))
        extra = sum(t - 1 for t in evidence.noisy_steps if t <= n)
        work = evidence.num_steps + extra + 3 * len(evidence.noisy_steps)
        scores.append((estimates.variance + estimates.variance_error) * work)
    return scores.index(min(scores))
