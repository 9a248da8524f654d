"""The chain's scheduler against those of diffusers, step by step, where they count or sign in ways of their own."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from rlr_peft.chain import PromptCache, RecordingScheduler, base_scheduler


@pytest.mark.parametrize("invert_sigmas", [False, True])
@pytest.mark.parametrize("of_tokens", [False, True])
def test_steps_without_noise_are_those_of_diffusers(invert_sigmas: bool, of_tokens: bool) -> None:
    """Mochi's levels lead from 0 to 1; LTXConditionPipeline tells a timestep for every token."""
    if invert_sigmas and of_tokens:
        pytest.skip("diffusers looks for the next level below, where there is none")
    own = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=invert_sigmas)
    chain = RecordingScheduler(base_scheduler(own), "ancestral", eta=0.0)
    chain.expose(4, 0, None)
    levels = [1.0, 0.75, 0.5, 0.25]
    for scheduler in (own, chain):
        scheduler.set_timesteps(sigmas=levels)
    torch.testing.assert_close(chain.timesteps, own.timesteps, rtol=0, atol=1e-3)
    torch.testing.assert_close(chain.sigmas, own.sigmas[:4], rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    here = there = torch.randn(2, 6, 3, generator=generator)
    for t in own.timesteps:
        output = torch.randn(2, 6, 3, generator=generator)
        tokens: dict[str, Any] = {"per_token_timesteps": t.expand(2, 6)} if of_tokens else {}
        here = chain.step(output, t, here, return_dict=False, **tokens)[0]
        there = own.step(output, t, there, return_dict=False, **tokens)[0]
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    difference = chain.for_inference(own.config, []).difference
    assert difference is None


def test_tokens_with_timesteps_of_their_own_are_refused() -> None:
    chain = RecordingScheduler(base_scheduler(FlowMatchEulerDiscreteScheduler()), "ancestral", eta=0.0)
    chain.expose(2, 0, None)
    chain.set_timesteps(2)
    latents, timesteps = torch.zeros(1, 2, 3), torch.tensor([[chain.timesteps[0], 0.0]])
    with pytest.raises(ValueError, match="expected one timestep for all latents, got tokens with others"):
        chain.step(latents, chain.timesteps[0], latents, per_token_timesteps=timesteps)


def test_embeddings_in_lists_of_lists_are_remembered() -> None:
    """Z-Image's Omni pipeline has a list of tensors for every prompt."""
    asked = []

    def encode_prompt(prompt: list[str]) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
        asked.append(prompt)
        return [[torch.full((len(text), 2), float(len(text)), dtype=torch.float64)] for text in prompt], []

    cache = PromptCache(encode_prompt, torch.float32)
    for _ in range(2):
        embeddings, none = cache(prompt=["a", "sky"])
        assert none == [] and isinstance(embeddings, list)
        assert [[entry.tolist() for entry in own] for own in embeddings] == [[[[1.0] * 2]], [[[3.0] * 2] * 3]]
        assert embeddings[0][0].dtype == torch.float32
    assert asked == [["a"], ["sky"]]


def test_large_embeddings_are_forgotten_before_small_ones_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def encode_prompt(prompt: list[str]) -> tuple[torch.Tensor]:
        asked.append(prompt[0])
        return (torch.zeros(1, 4, 8),)

    cache = PromptCache(encode_prompt, torch.float32)
    monkeypatch.setattr("rlr_peft.chain.encodings.MAX_PROMPT_BYTES", 2 * 4 * 8 * 4)
    monkeypatch.setattr("rlr_peft.chain.encodings.MAX_JOINED_BYTES", 0)
    for text in "abcab":
        cache(prompt=[text])
    assert asked == ["a", "b", "c", "a", "b"], "two fit, and the oldest one goes"
    cache(prompt=["a"])
    assert len(asked) == 5


def test_a_step_from_where_no_noise_is_left_is_refused() -> None:
    own = DDIMScheduler(num_train_timesteps=10, trained_betas=[0.0, *[0.01] * 9], clip_sample=False)
    chain = RecordingScheduler(base_scheduler(own), "ancestral", eta=1.0)
    chain.expose(5, 0, None)
    with pytest.raises(ValueError, match="from noise level 0 to 0 in step 5 of 5: expected levels that fall"):
        chain.set_timesteps(5)
