"""Which methods are compared, what their estimates are, and which ones do not exist for this chain and reward."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from rlr_peft.chain.steps import Chain
from rlr_peft.config import Config, EstimatorArguments
from rlr_peft.config.methods import METHODS, DrawnStepsArguments, RLRPaperArguments
from rlr_peft.config.policy import D3POArguments, ReusedSamplesArguments
from rlr_peft.diagnose import single_samples
from rlr_peft.diagnose.evidence import Evidence, update_size
from rlr_peft.diagnose.single_samples import SampleEstimates, sample_estimates
from rlr_peft.estimators.auto import weights_of
from rlr_peft.estimators.base import Estimator, RunShape, build_estimator
from rlr_peft.estimators.layout import RLRSettings
from rlr_peft.estimators.pathwise import CLIP_QUANTILE
from rlr_peft.estimators.rlr import RLREstimator
from rlr_peft.estimators.variance import GradientMoments, best_first_order_steps, inverse_variance_weights
from rlr_peft.estimators.zeroth_order import ZerothOrder

NUM_DRAWN_STEPS = 4
# Perturbations are so noisy that more of them would not change the picture, and each costs two chains.
MAX_ZEROTH_ORDER_SAMPLES = 8

# What a method sets, by the name of the flag.
Changes = dict[str, str | int | float]

NO_GRADIENT = "the reward has no gradient"
NO_NOISE = "the chain has no noise, so it has no score terms"
OF_A_GRADIENT = (
    *("full-bp", "truncated-bp", "draft-lv", "drtune", "leap", "flowbp-sparse", "flowbp-bridge", "rsm"),
    *("adjoint-matching", "refl", "rlr with measured K"),
)


def quoted(name: str) -> str:
    """Names of methods hold commas, so they are quoted inside sentences."""
    return f'"{name}"'


@dataclass(frozen=True)
class Method:
    """One way to estimate the gradient.

    Attributes:
        name: in the tables.
        flags: what selects it in training; empty where no flag does.
        estimator: what is run to measure its cost.
        estimates: those of single samples; None where only running it can tell.
        max_samples: how many samples to run it on at the most; None for all.
        shares_draws: whether the samples of a micro-batch share what it draws, where it is run.
        own_units: whether its gradient is in other units than the reward's, so that variances cannot be compared.
    """

    name: str
    flags: str
    estimator: Estimator
    estimates: SampleEstimates | None = None
    max_samples: int | None = None
    shares_draws: bool = True
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


def methods_to_compare(chain: Chain, evidence: Evidence, config: Config) -> ComparedMethods:
    """Every method that exists for the chain and the reward, with its estimates on the same samples.

    Args:
        config: lends the numbers that do not make a method another one, such as clips and scales, and the batch.
    """
    builder = _Builder(chain, evidence, config)
    if evidence.differentiable:
        builder.pathwise()
        builder.velocity_held()
    else:
        builder.left_out |= dict.fromkeys(OF_A_GRADIENT, NO_GRADIENT)
        builder.black_box()
    if evidence.noisy_steps:
        builder.score_function()
    else:
        builder.left_out |= dict.fromkeys(("reinforce", "ddpo", "grpo", "d3po", "rlr with score terms"), NO_NOISE)
    builder.run_only()
    return ComparedMethods(builder.methods, builder.left_out, builder.first_order_steps, builder.black_box_steps)


class _Builder:
    """Collects methods."""

    def __init__(self, chain: Chain, evidence: Evidence, config: Config) -> None:
        self.chain = chain
        self.evidence = evidence
        self.config = config
        self.generator = torch.Generator().manual_seed(config.training.seed)
        self.methods: list[Method] = []
        self.left_out: dict[str, str] = {}
        pathwise = evidence.gradients.pathwise
        self.moments = None if pathwise is None else GradientMoments.of(pathwise)
        self.first_order_steps = best_first_order_steps(evidence.variances)
        self.black_box_steps = 0 if evidence.differentiable else best_black_box_steps(evidence)

    def pathwise(self) -> None:
        """Methods of a reward with a gradient."""
        gradients, num_steps, best = self.evidence.gradients, self.evidence.num_steps, self.first_order_steps
        self._add("full-bp", single_samples.pathwise_tail(gradients, num_steps), {"estimator": "full-bp"})
        for k in sorted({1, math.ceil(num_steps / 4)}):
            tail = single_samples.pathwise_tail(gradients, k)
            self._add(f"truncated-bp, K = {k}", tail, {"estimator": "truncated-bp", "fo_steps": k})
        crossing = single_samples.first_and_half_order(gradients, best)
        self._add(
            f"rlr, K = {best} (measured)", crossing, {"estimator": "rlr", "fo_steps": best, "fo_roulette": "false"}
        )
        weights = inverse_variance_weights(self.evidence.variances)
        if best > 1:
            roulette: Changes = {"estimator": "rlr", "fo_steps": best, "fo_roulette": "true"}
            self._add_weighted(f"rlr, K = {best}, roulette", roulette)
        mixed = single_samples.mixed_orders(gradients, weights)
        self._add("rlr, mixed orders", mixed, {"estimator": "rlr", "step_choice": "inverse-variance"})
        if self.evidence.noisy_steps:
            single = single_samples.first_and_half_order(gradients, 1)
            self._add("rlr, K = 1", single, {"estimator": "rlr", "fo_steps": 1})
            self._drawn_steps(f"rlr, K = {best}", best, {"fo_steps": best, "fo_roulette": "false"})

    def velocity_held(self) -> None:
        """Drawn steps with the velocity held fixed between them."""
        gradients = self.evidence.gradients
        self._add_weighted("flowbp-sparse", self._drawn("flowbp-sparse"))
        self._add_weighted("flowbp-sparse, drawn evenly", self._drawn("flowbp-sparse") | {"step_density": 0})
        if self.evidence.noisy_steps:
            assert gradients.cotangent_squares is not None
            norms = gradients.cotangent_squares[0].sqrt()
            self._add_weighted("rsm", self._drawn("rsm"), (norms.quantile(CLIP_QUANTILE) / norms).clamp(max=1))
        else:
            self.left_out |= dict.fromkeys(
                ("rsm", "adjoint-matching"), "it weighs steps by their noise, and there is none"
            )

    def _drawn(self, name: str) -> Changes:
        """A method of drawn steps, no more of them than there are."""
        method = METHODS[name]
        assert issubclass(method, DrawnStepsArguments)
        num_steps = self.evidence.num_steps
        return {"estimator": name} | ({"fo_steps": num_steps} if num_steps < method().fo_steps else {})

    def black_box(self) -> None:
        """Methods of a reward without gradient."""
        evidence, chosen = self.evidence, self.black_box_steps
        if not evidence.noisy_steps:
            return
        tail = single_samples.black_box_tail(evidence.gradients, evidence.mirrored[:chosen])
        name = f"rlr, black-box tail of {chosen} (measured)"
        self._add(name, tail, {"estimator": "rlr", "black_box_steps": chosen})
        self._drawn_steps("rlr, no black-box tail", 0, {"black_box_steps": 0})

    def _drawn_steps(self, name: str, tail: int, changes: Changes) -> None:
        gradients = self.evidence.gradients
        beyond, name = sum(t > tail for t in self.evidence.noisy_steps), f"{name}, {NUM_DRAWN_STEPS} drawn score terms"
        if beyond > NUM_DRAWN_STEPS:
            drawn = single_samples.drawn_score_terms(gradients, tail, NUM_DRAWN_STEPS, self.generator)
            self._add(name, drawn, {"estimator": "rlr", **changes, "ho_blocks": NUM_DRAWN_STEPS})
        else:
            few = f"only {beyond} of the steps are left for score terms, too few to draw {NUM_DRAWN_STEPS} from"
            self.left_out[name] = few if beyond else "no step is left for score terms"

    def score_function(self) -> None:
        """Methods of score terms alone, with their own advantages."""
        evidence = self.evidence
        for name in ("reinforce", "ddpo", "grpo"):
            estimator = build_estimator(self._arguments({"estimator": name}), RunShape(evidence.num_steps))
            advantages = estimator.advantages(evidence.rewards, evidence.prompts, evidence.group_size)
            vectors = single_samples.score_terms(evidence.gradients, advantages)
            self._add(name, vectors, {"estimator": name}, own_units=name != "reinforce")
        if evidence.group_size % 2 or evidence.micro_batch_size < 2:
            self.left_out["d3po"] = (
                f"it needs pairs, got num_images_per_prompt {evidence.group_size} and micro-batches of "
                f"{evidence.micro_batch_size}"
            )
            return
        dpo_beta = D3POArguments(**self.config.estimator.fine_knobs(of=D3POArguments)).dpo_beta
        # At the reference every pair's slope is beta / 2, whatever the margin of its rewards.
        first, second = evidence.rewards.reshape(-1, 2).T
        slope = torch.sign(first - second) * dpo_beta / 2
        vectors = single_samples.score_terms(evidence.gradients, torch.stack([slope, -slope], dim=1).reshape(-1))
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
        paper = RLRPaperArguments(**self.config.estimator.fine_knobs(of=RLRPaperArguments))
        perturbed = ZerothOrder("two-point", paper.zo_scale)
        alone = RLREstimator(RLRSettings(first_order_steps=0, half_order=None, zeroth_order=perturbed))
        self.methods.append(Method("zeroth order on all steps", "", alone, max_samples=MAX_ZEROTH_ORDER_SAMPLES))
        for name in ("ram", "nft", "awm"):  # what they draw, noises, is of every sample by itself
            self._add(name, None, {"estimator": name}, shares_draws=False, own_units=True)
        if not differentiable:
            return
        self._add("refl", None, {"estimator": "refl"})
        # What it draws, noises, is of every sample by itself.
        self._add("draft-lv", None, {"estimator": "draft-lv"}, shares_draws=False)
        if self.evidence.num_steps > 1:
            self._add("leap", None, {"estimator": "leap"})
        drawn = ["drtune", "flowbp-bridge", *(["adjoint-matching"] if self.evidence.noisy_steps else [])]
        for name in drawn:
            self._add(name, None, self._drawn(name))

    def _add(
        self,
        name: str,
        estimates: SampleEstimates | torch.Tensor | None,
        changes: Changes,
        *,
        max_samples: int | None = None,
        shares_draws: bool = True,
        own_units: bool = False,
    ) -> None:
        if isinstance(estimates, torch.Tensor):
            estimates = sample_estimates(estimates)
        flags = " ".join(f"--{knob} {value}" for knob, value in changes.items())
        estimator = self._estimator(changes)
        self.methods.append(Method(name, flags, estimator, estimates, max_samples, shares_draws, own_units))

    def _add_weighted(self, name: str, changes: Changes, factors: torch.Tensor | None = None) -> None:
        """A method that weights the measured gradients, times factors of the samples."""
        weights = weights_of(self._estimator(changes), self.chain)
        self._add(name, single_samples.weighted_rows(self.evidence.gradients, weights, factors), changes)

    def _estimator(self, changes: Changes) -> Estimator:
        shape = RunShape(self.evidence.num_steps, samples=update_size(self.config).samples)
        estimator = build_estimator(self._arguments(changes), shape)
        if isinstance(estimator, RLREstimator):
            estimator.statistics.variances = self.evidence.variances
            estimator.statistics.moments = self.moments
        return estimator

    def _arguments(self, changes: Changes) -> EstimatorArguments:
        """The method's own defaults, and what does not make it another method from the user's config."""
        method = METHODS[str(changes["estimator"])]
        own: dict[str, Any] = {knob: value for knob, value in changes.items() if knob != "estimator"}
        if "fo_roulette" in own:
            own["fo_roulette"] = own["fo_roulette"] == "true"
        if issubclass(method, ReusedSamplesArguments):
            own["inner_epochs"] = 1
        return method(**self.config.estimator.fine_knobs(of=method) | own)


def best_black_box_steps(evidence: Evidence) -> int:
    """The length n of the black-box tail whose estimate has the smallest variance times cost, in 0..n tried."""
    scores = []
    for n in range(len(evidence.mirrored) + 1):
        estimates = sample_estimates(single_samples.black_box_tail(evidence.gradients, evidence.mirrored[:n]))
        extra = sum(t - 1 for t in evidence.noisy_steps if t <= n)
        work = evidence.num_steps + extra + 3 * len(evidence.noisy_steps)
        scores.append((estimates.variance + estimates.variance_error) * work)
    return scores.index(min(scores))
