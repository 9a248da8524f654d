"""Draws images for eyes and for comparisons: without dropout, without gradients, and never with NaN unsaid."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.errors import UserError
from rlr_peft.prompt import Prompt

logger = logging.getLogger(__name__)


class ImagesError(UserError, ValueError):
    """Images that are no images: NaN or infinity somewhere on the way."""


@torch.no_grad()
def render(chain: DenoisingChain, prompts: list[Prompt], seeds: list[int]) -> torch.Tensor:
    """Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1]; sample i depends on its prompt and seed alone.

    Raises:
        ImagesError: the latents of a step or the decoded images are not finite.
    """
    with in_eval_mode(chain):
        trajectory = chain.sample(prompts, seeds)
        images = chain.decode(trajectory.latents[0], prompts).float()
    _check_finite(chain, trajectory.latents, images, prompts)
    flat = images.flatten(1)
    constant = [prompt for prompt, of_one_colour in zip(prompts, flat.amax(1) == flat.amin(1)) if of_one_colour]
    if constant:
        logger.warning(
            "%d of %d images have one colour throughout, the first is of %r: the reward was pushed too far, or numbers "
            "overflowed; look at them, and try --mixed_precision bf16 or no.",
            *(len(constant), len(prompts), constant[0].text),
        )
    return images


def _check_finite(
    chain: DenoisingChain, latents: torch.Tensor, images: torch.Tensor, prompts: Sequence[Prompt]
) -> None:
    """Names the first step after which numbers are not finite: ``latents`` are (T + 1, B, ...), noise last."""
    broken = ~images.flatten(1).isfinite().all(1)
    if not broken.any():
        return
    first = next(prompt for prompt, is_broken in zip(prompts, broken) if is_broken)
    finite = [bool(step.isfinite().all()) for step in latents]
    count = chain.num_steps
    if finite[0]:
        where = "the latents are finite and the decoded images are not"
        advice = (
            "the decoder overflowed: use --mixed_precision bf16 or no, or a VAE made for fp16 "
            "(--pretrained_vae_model_name_or_path)"
        )
    else:
        last_good = min(t for t in range(count + 1) if finite[t])
        where = f"the denoiser's latents are not finite from step {count - last_good + 1} of {count} on"
        advice = (
            "use --mixed_precision bf16 or no, check the base's and the adapter's weights, or train with a lower "
            "--learning_rate"
        )
    raise ImagesError(
        f"Expected finite images, got NaN or infinity in {int(broken.sum())} of {len(prompts)}, the first of "
        f'"{first}": {where}; {advice}.'
    )


@contextmanager
def in_eval_mode(chain: DenoisingChain) -> Iterator[None]:
    """Inside, the denoiser has no dropout."""
    was_training = chain.denoiser.training
    chain.denoiser.eval()
    try:
        yield
    finally:
        chain.denoiser.train(was_training)
