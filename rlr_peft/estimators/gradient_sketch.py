"""A random projection of gradients that keeps inner products: variances and cosines without storing gradients.

A count sketch (Charikar, Chen, Farach-Colton 2002) adds every component, with a random sign, into one of d buckets.
Inner products of sketches equal those of the vectors in expectation, with a standard error of about
``|a| |b| sqrt(2 / d)`` at the most.
"""

from collections.abc import Sequence

import torch


class GradientSketch:
    """Projects gradients of fixed shapes to d numbers; linear, and the same for the same seed.

    Args:
        parameters: lend the shapes and the device.
        dimension: d.
        seed: of the hashing.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], dimension: int = 4096, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = sum(parameter.numel() for parameter in parameters)
        device = parameters[0].device
        self.dimension = dimension
        self._buckets = torch.randint(dimension, (size,), generator=generator, dtype=torch.int32).to(device)
        self._signs = (2 * torch.randint(2, (size,), generator=generator, dtype=torch.int8) - 1).to(device)

    def __call__(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sketch (d,) of one tensor per parameter, on the CPU, in the gradients' precision."""
        vector = torch.cat([gradient.flatten() for gradient in gradients])
        sketch = torch.zeros(self.dimension, dtype=vector.dtype, device=vector.device)
        return sketch.index_add_(0, self._buckets, vector * self._signs).cpu()
