"""Variety and distance to the base in closed form, and the divergence of a chain whose KL is known."""

import itertools
import math

import numpy
import pytest
import torch
from scipy.spatial.distance import cosine

from rlr_peft.chain import noisy_steps
from rlr_peft.compare import mean_distances, measure_divergence, path_divergence, prompt_distances, variety
from rlr_peft.estimators import reference_mean
from rlr_peft.testing import LinearGaussianChain
from tests.estimators.chains import move_parameters


def test_distances_of_equal_orthogonal_and_opposite_features() -> None:
    features = torch.tensor([[2.0, 0, 0], [5.0, 0, 0], [0, 3.0, 0], [-1.0, 0, 0]])
    expected = torch.tensor([0 + 1 + 2, 0 + 1 + 2, 1 + 1 + 1, 2 + 2 + 1], dtype=torch.float64) / 3
    torch.testing.assert_close(mean_distances(features), expected)


def test_variety_is_the_mean_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    features, base = torch.randn(2, 7, 5, generator=generator)
    prompts = ["a", "b", "a", "c", "b", "a", "d"]  # three, two, and single ones that have no pair
    found = variety(features, prompts, base)

    def pairs(values: torch.Tensor, members: list[int]) -> float:
        rows = values.double().numpy()
        return float(numpy.mean([cosine(rows[i], rows[j]) for i, j in itertools.combinations(members, 2)]))

    everything = list(range(7))
    assert found.overall.value == pytest.approx(pairs(features, everything))
    assert found.overall_change is not None and found.within_prompt is not None and found.to_base is not None
    assert found.overall_change.value == pytest.approx(pairs(features, everything) - pairs(base, everything))
    of_prompts = [pairs(features, [0, 2, 5]), pairs(features, [1, 4])]
    changes = [of_prompts[0] - pairs(base, [0, 2, 5]), of_prompts[1] - pairs(base, [1, 4])]
    assert found.within_prompt.value == pytest.approx(numpy.mean(of_prompts))
    assert found.within_prompt.error == pytest.approx(numpy.std(of_prompts, ddof=1) / math.sqrt(2))
    assert found.within_prompt_change is not None
    assert found.within_prompt_change.value == pytest.approx(numpy.mean(changes))
    distances = [cosine(f, b) for f, b in zip(features.double().numpy(), base.double().numpy(), strict=True)]
    assert found.to_base.value == pytest.approx(numpy.mean(distances))


def test_the_error_over_pairs_is_that_of_repeated_draws() -> None:
    """Pairs share images and are not independent: 400 draws of 40 images tell how much their mean really varies."""
    generator = torch.Generator().manual_seed(0)
    drawn = [variety(torch.randn(40, 3, generator=generator) + 0.7, [str(i) for i in range(40)]) for _ in range(400)]
    errors = torch.tensor([found.overall.error for found in drawn])
    spread = torch.tensor([found.overall.value for found in drawn]).std()
    assert float(errors.mean()) == pytest.approx(float(spread), rel=0.15)


def test_a_collapsed_adapter_has_no_variety_left() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 4, generator=generator)
    found = variety(torch.ones(8, 4), list("aabbccdd"), base)
    assert found.overall.value == pytest.approx(0, abs=1e-12)
    assert found.within_prompt is not None and found.within_prompt.value == pytest.approx(0, abs=1e-12)
    assert found.overall_change is not None and found.overall_change.value < -0.3


def test_one_image_a_prompt_says_nothing_within_prompts() -> None:
    found = variety(torch.eye(3), ["a", "b", "c"])
    assert found.within_prompt is None and found.overall.value == 1
    assert len(prompt_distances(torch.eye(3), ["a", "b", "c"])) == 0


@pytest.mark.parametrize(
    ("features", "prompts", "base", "message"),
    [
        (torch.ones(1, 3), ["a"], None, "2 or more images"),
        (torch.ones(3, 3), ["a", "b"], None, "2 prompts"),
        (torch.ones(2, 3), ["a", "b"], torch.ones(2, 4), "features of one shape"),
    ],
)
def test_what_does_not_fit_is_refused(
    features: torch.Tensor, prompts: list[str], base: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        variety(features, prompts, base)


def test_the_divergence_of_a_path_sums_the_kl_of_its_steps() -> None:
    chain = LinearGaussianChain(num_steps=4)
    prompts, seeds = [""] * 6, list(range(6))
    torch.testing.assert_close(path_divergence(chain, prompts, seeds), torch.zeros(6), atol=1e-12, rtol=0)
    move_parameters(chain, 0.2)
    trajectory = chain.sample(prompts, seeds)
    expected = torch.zeros(6, dtype=torch.float64)
    with torch.no_grad():
        for t in (2, 3, 4):  # step 1 has no noise
            step = chain.replay(trajectory, t)
            means = (step.mean, reference_mean(chain, trajectory, t))
            normals = [torch.distributions.Normal(mean, step.std) for mean in means]
            expected += torch.distributions.kl_divergence(*normals).sum(1)
    assert float(expected.min()) > 0
    torch.testing.assert_close(path_divergence(chain, prompts, seeds), expected.float(), rtol=1e-5, atol=1e-6)


def test_a_plan_is_measured_in_batches() -> None:
    asked: list[tuple[list[str], list[int]]] = []

    def measure(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        asked.append((prompts, seeds))
        return torch.tensor(seeds).float()

    found = measure_divergence(measure, list("abcde"), [5, 4, 3, 2, 1], 2)
    assert found.tolist() == [5, 4, 3, 2, 1]
    assert asked == [(["a", "b"], [5, 4]), (["c", "d"], [3, 2]), (["e"], [1])]


def test_a_chain_without_noise_has_no_divergence() -> None:
    chain = LinearGaussianChain(num_steps=1)
    assert not noisy_steps(chain)
    with pytest.raises(ValueError, match="Expected noise in the chain, without which the divergence"):
        path_divergence(chain, [""], [0])
