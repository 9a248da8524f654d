"""The negative branch of guidance off the tape: on every family values stay, and gradients are what they should be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain import DenoisingChain, ReplayedStep
from tests.families.table import CASES, PROMPTS, load, prompts_of
from tests.pipelines import chain_over

NAMES = [name for name in CASES if name not in ("sd-v", "flux")]
SCALES = {"flux-true-cfg": {}}
SCALES |= {name: {"guidance_scale": 3.0, "negative_prompt": "ugly"} for name in ("qwen-image", "qwen-image-edit")}
SECOND_CALL = (*SCALES, "wan-2.1", "wan-2.2", "wan-i2v")


def chains(pipeline: DiffusionPipeline, name: str, **options: Any) -> tuple[DenoisingChain, DenoisingChain]:
    """The chain as it is, and with the branch detached."""
    options = {"num_inference_steps": 2, **CASES[name].options, **SCALES.get(name, {"guidance_scale": 3.0}), **options}
    plain, detached = chain_over(pipeline, **options), chain_over(pipeline, detach_negative=True, **options)
    for chain in (plain, detached):
        chain.denoiser.requires_grad_(False)
        targets = [weight for key, weight in chain.denoiser.named_parameters() if key.endswith("to_v.weight")]
        chain.parameters = [targets[0].requires_grad_(), targets[-1].requires_grad_()]
    return plain, detached


def gradients(chain: DenoisingChain, trajectory: Any, t: int) -> tuple[Tensor, list[Tensor]]:
    """A step's mean, and the gradients of a fixed cotangent there by the weights and the latents."""
    step = ReplayedStep(chain, trajectory, t)
    noise = torch.randn(step.output.shape, generator=torch.Generator().manual_seed(5))
    by_weights, by_latents = step.into_both(noise)
    return step.output.detach(), [*by_weights, by_latents]


@contextmanager
def outputs_detached(pipeline: DiffusionPipeline, name: str) -> Iterator[None]:
    """What the knob must come to, on the undivided call: the negative part of the denoiser's result is a constant."""
    calls = 0

    def detach(module: torch.nn.Module, inputs: object, result: Any) -> Any:
        nonlocal calls
        calls += 1
        output = result[0]
        if name in SECOND_CALL:
            return result if calls % 2 else (output.detach(),)
        if len(output) == len(PROMPTS):  # a further pass of LTX-2's guidance, which all lead towards the prompt
            return result
        middle = len(output) // 2
        if name == "z-image":
            return ([*output[:middle], *(one.detach() for one in output[middle:])],)
        if not isinstance(result, tuple):
            return type(result)(sample=torch.cat([output[:middle].detach(), output[middle:]]))
        return tuple(torch.cat([part[:middle].detach(), part[middle:]]) for part in result)

    parts = [getattr(pipeline, part, None) for part in ("unet", "transformer", "transformer_2")]
    hooks = [part.register_forward_hook(detach) for part in parts if part is not None]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_a_constant_negative_branch(name: str, folder_of: Callable[[str], str]) -> None:
    pipeline = load(folder_of(name))
    plain, detached = chains(pipeline, name)
    trajectory = detached.sample(prompts_of(name), [3, 4])
    for t in (1, 2) if name == "wan-2.2" else (2,):  # one for each expert
        step = detached.replay(trajectory, t)
        assert torch.equal(step.next_latents(trajectory.noise(t)), trajectory.latents[t - 1]), "bit for bit"
        mean, got = gradients(detached, trajectory, t)
        whole_mean, whole = gradients(plain, trajectory, t)
        torch.testing.assert_close(mean, whole_mean, rtol=1e-4, atol=1e-5)
        with outputs_detached(pipeline, name):
            _, expected = gradients(plain, trajectory, t)
        for here, there in zip(got, expected, strict=True):
            assert (here - there).norm() <= 1e-4 * there.norm()
        change = sum(float((left - right).norm()) for left, right in zip(whole[:-1], expected[:-1], strict=True))
        assert change > 0.01 * sum(float(right.norm()) for right in expected[:-1]), "the branch must matter"
    assert not plain.departures and "negative branch" in detached.departures[0]
    assert not detached.at(whole=True).departures


@pytest.mark.parametrize("name", ["sd-epsilon", "sd3", "wan-2.1"])
def test_it_is_the_scale_times_the_gradient_of_the_prompts_own_branch(
    name: str, folder_of: Callable[[str], str]
) -> None:
    """The guided output is n + g (p - n): with n held fixed the weights' gradient is g times that of p alone."""
    pipeline = load(folder_of(name))
    _, detached = chains(pipeline, name)
    trajectory = detached.sample(prompts_of(name), [3, 4])
    _, got = gradients(detached, trajectory, 2)
    _, alone = gradients(detached.at(guidance=1.0), trajectory, 2)
    for here, there in zip(got[:-1], alone[:-1], strict=True):
        assert (here - 3.0 * there).norm() <= 1e-4 * here.norm()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ltx-2"])
def test_without_guidance_a_step_is_of_the_conditional_prediction(name: str, folder_of: Callable[[str], str]) -> None:
    """Guided outputs are linear in the scale: two of them give the one at which guidance is off.

    Qwen-Image scales its guided output to the length of the conditional one: near the off scale it is linear too.
    """
    pipeline = load(folder_of(name))
    scale = "true_cfg_scale" if name == "flux-true-cfg" else "guidance_scale"
    off = chains(pipeline, name)[0].family.no_guidance
    low, high = (chains(pipeline, name, **{scale: off + above})[0] for above in (0.25, 0.5))
    trajectory = low.sample(prompts_of(name), [3, 4])
    with low.without_guidance():
        got = low.replay(trajectory, 2).mean.detach()
    guided, more = (chain.replay(trajectory, 2).mean.detach() for chain in (low, high))
    assert torch.equal(guided + low.std(2) * trajectory.noise(2), trajectory.latents[1]), "guidance is back"
    expected = 2.0 * guided - more
    assert (got - expected).norm() < 0.02 * (got - guided).norm()


def test_without_guidance_all_guidance_of_ltx_2_is_off(folder_of: Callable[[str], str]) -> None:
    """It has that of the sound, of skipped layers and of each by itself, and rescales what comes out."""
    pipeline = load(folder_of("ltx-2"))
    chain, _ = chains(pipeline, "ltx-2")
    trajectory = chain.sample(PROMPTS, [3, 4])
    batches: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, named: batches.append(len(named["hidden_states"])), with_kwargs=True
    )
    guided = chain.replay(trajectory, 2).mean
    with chain.without_guidance():
        got = chain.replay(trajectory, 2).mean
    unguided = chain.at(guidance=1.0)
    alone = unguided.replay(trajectory, 2).mean
    hook.remove()
    assert batches == [4, 2, 2, 2, 2]
    assert torch.equal(got, alone) and not torch.equal(got, guided)
    assert unguided.call_arguments["audio_guidance_scale"] == 1.0 and "stg_scale" not in chain.call_arguments


def test_guidance_that_is_built_into_the_model_stays(folder_of: Callable[[str], str]) -> None:
    chain = chain_over(load(folder_of("flux")), num_inference_steps=2, **CASES["flux"].options)
    trajectory = chain.sample(PROMPTS, [3, 4])
    with chain.without_guidance():
        assert torch.equal(chain.replay(trajectory, 2).next_latents(trajectory.noise(2)), trajectory.latents[1])


def test_half_of_the_tape_is_spared_and_the_pipeline_is_left_alone(folder_of: Callable[[str], str]) -> None:
    pipeline = load(folder_of("sd-epsilon"))
    held = []
    for chain in chains(pipeline, "sd-epsilon"):
        trajectory = chain.sample(PROMPTS, [3, 4])
        with counted_tape() as tape, torch.enable_grad():
            step = chain.replay(trajectory, 1)
            held.append(tape.live)
        del step
    assert held[1] < 0.6 * held[0]
    assert "forward" not in pipeline.unet.__dict__


def test_dropout_has_the_same_masks_when_a_step_is_replayed(folder_of: Callable[[str], str]) -> None:
    pipeline = load(folder_of("sd-epsilon"))
    for module in pipeline.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    _, chain = chains(pipeline, "sd-epsilon")
    chain.denoiser.train()
    trajectory = chain.sample(PROMPTS, [3, 4])
    with torch.enable_grad():
        step = chain.replay(trajectory, 2)
    assert torch.equal(step.next_latents(trajectory.noise(2)), trajectory.latents[1])


def test_where_there_is_no_negative_branch_it_is_refused(folder_of: Callable[[str], str]) -> None:
    built_in = "expected guidance with a negative branch, got FluxPipeline at scale 3.5 without one: it is off, or "
    with pytest.raises(ValueError, match=built_in):
        chain_over(load(folder_of("flux")), detach_negative=True, **CASES["flux"].options)
    with pytest.raises(ValueError, match="got StableDiffusionPipeline at scale 1 without one"):
        chain_over(load(folder_of("sd-epsilon")), detach_negative=True, guidance_scale=1.0)
