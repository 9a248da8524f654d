"""The random projection: linear, repeatable, and true to inner products."""

import torch

from rlr_peft.estimators import GradientSketch

SHAPES = [(3, 4), (7,), (2, 2, 5)]


def gradients(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def test_a_sketch_is_linear_and_the_same_for_the_same_seed() -> None:
    a, b = gradients(0), gradients(1)
    before = torch.get_rng_state()
    sketch = GradientSketch(a, dimension=16)
    both = [2 * x - 3 * y for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(sketch(both), 2 * sketch(a) - 3 * sketch(b))
    assert sketch(a).shape == (16,) and sketch(a).dtype == torch.float64
    assert torch.equal(GradientSketch(b, dimension=16)(a), sketch(a)), "only the shapes of the parameters count"
    assert not torch.equal(GradientSketch(a, dimension=16, seed=1)(a), sketch(a))
    assert torch.equal(torch.get_rng_state(), before), "the global random state must not move"


def test_inner_products_are_unbiased_with_the_stated_error() -> None:
    """Over 2000 hashings: the mean within 4 standard errors, the deviation at most |a| |b| sqrt(2 / d)."""
    dimension = 16
    for other in (1, 0):  # of two vectors, and of one with itself
        a, b = gradients(0), gradients(other)
        exact = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
        norms = [float(sum(x.square().sum() for x in vector)) ** 0.5 for vector in (a, b)]
        products = torch.tensor(
            [float(sketch(a) @ sketch(b)) for sketch in (GradientSketch(a, dimension, seed) for seed in range(2000))]
        )
        bound = norms[0] * norms[1] * (2 / dimension) ** 0.5
        assert abs(float(products.mean()) - exact) < 4 * float(products.std()) / 2000**0.5
        # the estimate of a deviation from 2000 values is good to 2 % or so
        assert 0.5 * bound < float(products.std()) < 1.1 * bound
