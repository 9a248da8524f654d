"""The choice of K, of the mixture's weights, and of h from a budget."""

from collections.abc import Sequence

import pytest
import torch

from rlr_peft.estimators import (
    StepVariances,
    best_first_order_steps,
    half_order_length_for_compute,
    half_order_length_for_memory,
    inverse_variance_weights,
)


def variances(
    first_order: Sequence[float] | None, half_order: Sequence[float], noiseless: Sequence[int] = ()
) -> StepVariances:
    """Of steps 1..T, of which some have no noise."""
    has_noise = torch.tensor([t not in noiseless for t in range(1, len(half_order) + 1)])
    first = None if first_order is None else torch.tensor(first_order, dtype=torch.float64)
    return StepVariances(first, torch.tensor(half_order, dtype=torch.float64), has_noise)


def test_the_best_k_has_the_smallest_sum_of_variances() -> None:
    first_order, half_order = [0.1, 0.2, 0.15, 6.4, 8.0], [0.0, 40.0, 0.17, 0.06, 0.05]
    assert best_first_order_steps(variances(first_order, half_order, noiseless=[1])) == 3
    assert best_first_order_steps(variances([6.4, 8.0], [0.06, 0.05])) == 0
    assert best_first_order_steps(variances([6.4, 8.0], [0.06, 0.05], noiseless=[1])) == 1
    assert best_first_order_steps(variances([6.4, 8.0], [0.06, 0.05], noiseless=[2])) == 2, "it has no score term"
    assert best_first_order_steps(variances(None, half_order)) == 0, "there is no pathwise term"


def test_a_smaller_k_must_halve_the_sum() -> None:
    assert best_first_order_steps(variances([1.0, 1.0], [9.0, 0.1])) == 2, "1.1 is not half of 2"
    assert best_first_order_steps(variances([1.0, 1.3], [9.0, 0.1])) == 1, "1.1 is less than half of 2.3"


def test_inverse_variance_weights_minimise_the_variance_of_a_step() -> None:
    first_order = torch.tensor([3.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    half_order = torch.tensor([1.0, 1.0, 5.0, 8.0], dtype=torch.float64)
    weights = inverse_variance_weights(StepVariances(first_order, half_order, torch.ones(4, dtype=torch.bool)))
    assert weights.tolist() == pytest.approx([0.25, 0.5, 1.0, 0.8])

    def variance(w: torch.Tensor) -> torch.Tensor:
        return w**2 * first_order + (1 - w) ** 2 * half_order

    for shift in (-0.01, 0.01):
        assert torch.all(variance(weights) < variance(weights + shift))


def test_inverse_variance_weights_where_a_term_is_missing_or_negligible() -> None:
    measured = variances([1.0, 1e-4, 1.0, 0.0], [0.0, 1.0, 1e-4, 0.0], noiseless=[1])
    assert inverse_variance_weights(measured).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(("budget", "expected"), [(8 + 0.24 * 48, 1), (30, 2), (40, 3), (1000, 49)])
def test_the_papers_memory_rule(budget: float, expected: int) -> None:
    """B_h = 8 GB, B_z = .24 GB, T = 50; with 30 to 40 GB the paper uses h = 2."""
    assert half_order_length_for_memory(budget, 8.0, 0.24, 50) == expected
    with pytest.raises(ValueError, match=r"memory_budget >= 19\.52 GB"):
        half_order_length_for_memory(12, 8.0, 0.24, 50)


def test_both_rules_give_a_block_of_one_step_where_the_chain_has_no_more() -> None:
    """A block of no step would be laid for ever."""
    assert half_order_length_for_memory(20, 8.0, 0.24, 1) == 1
    assert half_order_length_for_compute(100, 1, 1, num_blocks=1, zeroth_order_evaluations=0) == 1


def test_the_compute_rule_spends_the_budget() -> None:
    assert half_order_length_for_compute(120, 50, 1, num_blocks=1, zeroth_order_evaluations=50) == 19
    assert half_order_length_for_compute(10_000, 50, 1, num_blocks=1, zeroth_order_evaluations=0) == 49
    with pytest.raises(ValueError, match="nfe_budget >= 52"):
        half_order_length_for_compute(51, 50, 1, num_blocks=1, zeroth_order_evaluations=0)
