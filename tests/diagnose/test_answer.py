"""Which method is named, on chains where the best is known; and the columns that decide against brute force."""

from dataclasses import replace

import pytest
import torch

from rlr_peft.config import load_config
from rlr_peft.diagnose import (
    Diagnosis,
    SampleEstimates,
    UpdateSize,
    agreement,
    clear_gradients,
    improvement_per_cost,
    length_along,
    methods_to_compare,
    noise_scale,
    plain_numbers,
    recommend,
    sample_estimates,
)
from rlr_peft.estimators import leave_one_out
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.diagnose.diagnoses import (
    GROUP,
    REQUIRED,
    config_with,
    diagnosis_of,
    evidence_of,
    result_of,
    rollout_of,
    sketch_of,
)


@pytest.fixture(scope="module")
def short() -> Diagnosis:
    """Steps that hardly pass on what they get leave the gradient to step 1."""
    chain = LinearGaussianChain(num_steps=6, decay=(0.05, 0.05), gain=(1.0, 0.05))
    return diagnosis_of(chain, QuadraticReward(chain), 32)


def with_improvements(diagnosis: Diagnosis, **improvements: float) -> Diagnosis:
    """All other methods promise nothing."""
    results = [
        replace(r, improvement=improvements.get(r.method.flags.removeprefix("--estimator ").split(" ")[0], 0.0))
        for r in diagnosis.results
    ]
    return replace(diagnosis, results=results)


def test_a_biased_method_is_named_where_it_is_better(short: Diagnosis) -> None:
    advice = recommend(short)
    truncated, full = result_of(short, "truncated-bp, K = 1"), result_of(short, "rlr, K = 6 (measured)")
    assert truncated.improvement > 2 * full.improvement and truncated.length == pytest.approx(1, abs=0.1)
    assert (
        "--estimator rlr" not in advice.flags
        and "It is biased: its cosine with the full gradient is 0.9" in " ".join(advice.answer)
    )
    assert 'times that of "rlr, K = 6, roulette"' in advice.answer[0] and len(advice.answer) == 3
    load_config([*REQUIRED, "--num_inference_steps", "6", *advice.flags.split()])


def test_truncation_is_not_named_where_it_leads_astray() -> None:
    """The last step turns what it is given round, so that its own gradient points against all others."""
    chain = LinearGaussianChain(num_steps=3, decay=(-3.0, 4.0), gain=(0.1, 0.1))
    diagnosis = diagnosis_of(chain, QuadraticReward(chain), 32)
    astray = ("truncated-bp", "refl", "draft-lv")
    for name in ("truncated-bp, K = 1", *astray[1:]):
        result = result_of(diagnosis, name)
        assert result.length < 0 and result.improvement == 0
    assert recommend(diagnosis).flags.split()[1] not in astray


def test_a_biased_method_is_named_only_where_it_promises_more(short: Diagnosis) -> None:
    for promised, named in ((1.0, "rlr"), (1.1, "refl")):
        advice = recommend(with_improvements(short, rlr=1.0, refl=promised))
        assert advice.flags.startswith(f"--estimator {named}")
    alone = recommend(with_improvements(short, rlr=1.0))
    assert (
        alone.answer[1] == "It is unbiased, and no biased method promises more."
        and alone.flags == "--estimator rlr --fo_steps 6 --fo_roulette false"
    )


def test_a_biased_method_that_may_point_elsewhere_is_not_named(short: Diagnosis) -> None:
    """As many samples point against the full gradient as along it, nearly."""
    diagnosis = with_improvements(short, rlr=1.0, refl=2.0)
    signs = torch.ones(32, 1)
    signs[::2] = -0.9
    changed = [
        replace(r, estimates=sample_estimates(signs * diagnosis.reference.estimates.vectors))
        if r.method.name == "refl"
        else r
        for r in diagnosis.results
    ]
    advice = recommend(replace(diagnosis, results=changed))
    assert advice.flags.startswith("--estimator rlr")
    assert '"refl" promises 2.00 times as much, but it is biased, and' in advice.answer[1]


def test_without_signal_the_least_noisy_unbiased_method_is_named(short: Diagnosis) -> None:
    def noise(estimates: SampleEstimates) -> SampleEstimates:
        signs = torch.tensor([1.0, -1.0]).repeat(len(estimates.samples) // 2)[:, None]
        return replace(estimates, vectors=signs * estimates.vectors[0])

    results = [replace(r, estimates=noise(r.estimates)) for r in short.results]
    reference = next(r for r in results if r.method.name == short.reference.method.name)
    silent = replace(short, results=results, reference=reference)
    advice = recommend(silent)
    assert advice.flags == "--estimator rlr --fo_steps 6 --fo_roulette false"
    assert "show no gradient above the noise" in advice.answer[1]
    rows = plain_numbers(silent, advice)["methods"]
    assert all(row["noise_scale"] == float("inf") for row in rows)


def test_improvement_and_length_are_those_of_simulated_updates() -> None:
    """Against means of simulated updates, each sample with its own noise and each micro-batch with its own draw."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([1.0, 0.0, 0.0])
    update = UpdateSize(samples=8, micro_batches=2)

    def drawn(micro_batches: int, samples: int) -> torch.Tensor:
        """(micro-batches, samples, 3): half as long as the truth, and bent; the draw moves all of a micro-batch."""
        own = torch.randn(micro_batches, samples, 3, generator=generator)
        shared = 0.7 * torch.randn(micro_batches, 1, 3, generator=generator)
        return torch.tensor([0.5, 0.5, 0.0]) + own + shared

    count = 40_000
    # Samples i and i + n / 2 share a draw.
    pairs = drawn(count // 2, 2).transpose(0, 1).reshape(count, 3)
    estimates = sample_estimates(pairs, draws=torch.arange(count) % (count // 2))
    reference = sample_estimates(truth + torch.randn(count, 3, generator=generator))
    updates = drawn(2 * 20_000, 4).reshape(20_000, 8, 3).mean(1)
    expected = float(updates.mean(0) @ truth) / float(updates.square().sum(1).mean()) ** 0.5
    assert improvement_per_cost(estimates, reference, 5.0, update) == pytest.approx(expected / 5, rel=0.06)
    assert length_along(estimates, reference) == pytest.approx(0.5, abs=0.06)
    assert noise_scale(estimates) == pytest.approx(3 * 1.49 / 0.5, rel=0.15)
    assert estimates.shared == pytest.approx(3 * 0.49, rel=0.15)
    cosine = agreement(
        *(
            replace(e, vectors=e.vectors[:200], samples=list(range(200)), draws=torch.arange(200))
            for e in (estimates, reference)
        ),
        2,
    )
    assert cosine is not None and cosine.low < 0.5**0.5 < cosine.high and cosine.high - cosine.low < 0.8


@pytest.mark.parametrize("name", ["flowbp-sparse", "flowbp-sparse, drawn evenly", "rsm", "rlr, K = 6, roulette"])
def test_drawn_steps_from_sketches_are_what_running_gives(name: str) -> None:
    """Mean and variance over the draws of one sample's estimate."""
    chain, evidence = LinearGaussianChain(num_steps=6, last_std=0.2), evidence_of(16)
    objective = QuadraticReward(chain)
    method = next(m for m in methods_to_compare(chain, evidence, config_with()).methods if m.name == name)
    assert method.estimates is not None
    rollout = rollout_of(chain, objective, 16)
    sample, advantages = rollout.select([3]), leave_one_out(rollout.rewards, GROUP)[[3]]
    if name == "rsm":
        assert evidence.gradients.cotangent_squares is not None
        method.estimator.load_state_dict({"norms": evidence.gradients.cotangent_squares[0].sqrt().tolist()})
    runs, sketch, generator, ran = 400, sketch_of(chain), torch.Generator().manual_seed(0), []
    for _ in range(runs):
        method.estimator.accumulate(chain, objective, sample, advantages, generator)
        ran.append(sketch([p.grad for p in chain.parameters]).double())
        clear_gradients(chain)
    variance, mean = torch.stack(ran).var(0).sum(), method.estimates.vectors[3].double()
    # The weights' moments come from as many draws, about.
    assert (torch.stack(ran).mean(0) - mean).norm() < 4 * (2 * variance / runs).sqrt()
    center = method.estimates.vectors.double().mean(0)
    of_draws = float(method.estimates.squares[3]) - float((mean - center).square().sum()) * 16 / 15
    assert of_draws == pytest.approx(float(variance), rel=0.15)
    assert (method.estimates.shared > 0) == ("roulette" not in name)
