"""Hot steps: those whose mean reacts so strongly to the denoiser that a score term is very noisy there."""

from collections.abc import Iterable

from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.plan import Plan

# A step is hot whose mean moves more than this per unit of denoiser output and of its noise.
HOT_STEP = 3.0


def hot_steps(chain: Chain, plan: Plan) -> dict[int, float]:
    """``|d mean / d output| / std`` of the plan's score-term steps that are hot."""
    mixed = [] if plan.mixture is None else [int(i) + 1 for i in (plan.mixture < 1).nonzero()]
    return hot_among(chain, [*mixed, *(block.first_step for block, _ in plan.blocks)])


def hot_among(chain: Chain, noisy_steps: Iterable[int]) -> dict[int, float]:
    """``|d mean / d output| / std`` of those steps, all with noise, that are hot."""
    ratios = {t: chain.output_sensitivity(t) / chain.std(t) for t in noisy_steps}
    return {t: ratio for t, ratio in ratios.items() if ratio > HOT_STEP}
