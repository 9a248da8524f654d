"""The chain against the pipeline's own call, its own records, and central differences."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
)

from tests.pipelines import chain_over, tiny_stable_diffusion

PROMPTS = ["red", "a blue b"]
KINDS = ("ancestral", "flow-sde", "cps", "ode")


def own_images(pipeline, prompts: list[str], noises: torch.Tensor, steps: int, **arguments) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompts, latents=noises, num_inference_steps=steps, output_type="pt", **arguments).images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_without_noise_the_images_are_the_pipelines_own(
    prediction_type: str, spacing: str, guidance_scale: float
) -> None:
    pipeline = tiny_stable_diffusion(prediction_type, timestep_spacing=spacing)
    chain = chain_over(pipeline, num_inference_steps=5, eta=0.0, guidance_scale=guidance_scale, negative_prompt="ugly")
    trajectory = chain.sample(PROMPTS, [3, 4])
    with torch.no_grad():
        images = chain.decode(trajectory.latents[0], PROMPTS)
    expected = own_images(
        pipeline, PROMPTS, trajectory.latents[5], 5, guidance_scale=guidance_scale, negative_prompt=["ugly"] * 2
    )
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_initial_latents_are_those_of_the_pipelines_generator() -> None:
    pipeline = tiny_stable_diffusion()
    chain = chain_over(pipeline, num_inference_steps=4, eta=0.0, guidance_scale=3.0)
    trajectory = chain.sample(["red"], [11])
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(11)
    expected = pipeline(
        ["red"], num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="pt"
    ).images
    with torch.no_grad():
        torch.testing.assert_close(chain.decode(trajectory.latents[0], ["red"]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_replay_is_bit_exact(kind: str, prediction_type: str) -> None:
    chain = chain_over(tiny_stable_diffusion(prediction_type), num_inference_steps=6, step_kind=kind)
    trajectory = chain.sample(PROMPTS, [0, 1])
    for t in range(6, 0, -1):
        for step in (chain.replay(trajectory, t), torch.no_grad()(chain.replay)(trajectory, t)):
            assert torch.equal(step.next_latents(trajectory.noise(t)), trajectory.latents[t - 1])
            assert torch.equal(step.pred_original_sample, trajectory.pred_original_samples[t - 1])
            assert step.std == trajectory.std(t)
    assert torch.equal(chain.denoise(trajectory, 4, trajectory.latents[4], 1), trajectory.latents[1])


def test_a_sample_depends_on_its_own_seed_only() -> None:
    chain = chain_over(tiny_stable_diffusion(dtype=torch.float64), num_inference_steps=4)
    together = chain.sample([*PROMPTS, "c"], [7, 8, 9])
    alone = chain.sample(["a blue b"], [8])
    torch.testing.assert_close(together.latents[:, 1:2], alone.latents, rtol=0, atol=1e-10)
    assert torch.equal(together.select([1]).noises, alone.noises)


@pytest.mark.parametrize("kind", KINDS)
def test_hardly_any_noise_stays_in_the_image_where_the_grid_ends_just_short_of_clean(kind: str) -> None:
    """As Stable Diffusion's does, with alpha_0 of the first training step: sigma is .03 there."""
    pipeline = tiny_stable_diffusion("v_prediction", timestep_spacing="trailing")
    assert not pipeline.scheduler.config.set_alpha_to_one
    chain = chain_over(pipeline, num_inference_steps=4, step_kind=kind)
    trajectory = chain.sample(PROMPTS, [0, 1])
    assert chain.std(1) < 0.03
    last = chain.replay(trajectory, 1)
    assert last.std == chain.std(1) == trajectory.std(1)
    assert (trajectory.latents[0] - last.pred_original_sample).std() < 0.05


def central_difference(value: Callable[[float], torch.Tensor], h: float) -> float:
    """Fourth-order central difference of ``value`` at 0."""
    differences = 8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))
    return differences.item() / (12 * h)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_gradients_of_a_replayed_step_equal_central_differences(kind: str, prediction_type: str) -> None:
    pipeline = tiny_stable_diffusion(prediction_type, dtype=torch.float64)
    weight = pipeline.unet.get_parameter("mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight")
    pipeline.unet.requires_grad_(False)
    weight.requires_grad_()
    chain = chain_over(pipeline, num_inference_steps=5, step_kind=kind, guidance_scale=4.0)
    trajectory = chain.sample(["red"], [0])
    generator = torch.Generator().manual_seed(0)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    cotangent = normal(trajectory.latents[0])

    def value(latents: torch.Tensor, t: int) -> torch.Tensor:
        return (chain.replay(trajectory, t, latents).mean * cotangent).sum()

    @torch.no_grad()
    def value_at_moved_weight(direction: torch.Tensor, shift: float, t: int) -> torch.Tensor:
        original = weight.clone()
        weight.add_(direction, alpha=shift)
        result = value(trajectory.latents[t], t)
        weight.copy_(original)
        return result

    def check(t: int) -> None:
        latents = trajectory.latents[t].clone().requires_grad_()
        by_weight, by_latents = torch.autograd.grad(value(latents, t), [weight, latents])
        # A random direction plus the gradient's own, so that the derivative is not small by accident.
        along = normal(latents) / latents.numel() ** 0.5 + by_latents / by_latents.norm()
        difference = central_difference(lambda shift: value(trajectory.latents[t] + shift * along, t), h=1e-3)
        assert difference == pytest.approx((by_latents * along).sum().item(), rel=1e-5)
        turn = normal(weight) / weight.numel() ** 0.5 + by_weight / by_weight.norm()
        difference = central_difference(lambda shift: value_at_moved_weight(turn, shift, t), h=1e-3)
        assert difference == pytest.approx((by_weight * turn).sum().item(), rel=1e-5)

    for t in (1, 3, 5):
        check(t)


def test_dropout_masks_are_replayed() -> None:
    pipeline = tiny_stable_diffusion()
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0]
    attention.attn1.to_out[1].p = 0.5
    pipeline.unet.train()
    chain = chain_over(pipeline, num_inference_steps=4)
    trajectory = chain.sample(PROMPTS, [0, 1])
    before = torch.get_rng_state()
    for t in range(1, 5):
        assert torch.equal(chain.replay(trajectory, t).next_latents(trajectory.noise(t)), trajectory.latents[t - 1])
    assert torch.equal(torch.get_rng_state(), before), "the global random state must not move"
    other = chain.sample(PROMPTS, [5, 6], noises=trajectory.noises)
    assert not torch.equal(other.latents[0], trajectory.latents[0]), "other seeds drop other activations"


def test_the_pipeline_is_left_as_it_was() -> None:
    pipeline = tiny_stable_diffusion()
    scheduler, encode = pipeline.scheduler, pipeline.encode_prompt
    chain = chain_over(pipeline, num_inference_steps=3)
    trajectory = chain.sample(PROMPTS, [0, 1])
    chain.replay(trajectory, 2)
    assert pipeline.scheduler is scheduler
    assert pipeline.encode_prompt == encode
    assert pipeline.config["scheduler"] == ("diffusers", "DDIMScheduler")


def test_nothing_moves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    chain = chain_over(tiny_stable_diffusion(), num_inference_steps=3)
    chain.encode(PROMPTS)
    trajectory = chain.sample(PROMPTS, [0, 1])
    chain.replay(trajectory, 2)
    chain.decode(trajectory.latents[0], PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_stable_diffusion()
    calls = []
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    chain = chain_over(pipeline, num_inference_steps=3)
    calls.clear()
    trajectory = chain.sample(PROMPTS, [0, 1])
    encoded = len(calls)
    for t in (3, 2, 1):
        chain.replay(trajectory, t)
    chain.sample(PROMPTS[::-1], [4, 5])
    assert len(calls) == encoded == 4  # two prompts, each with its empty negative


def test_a_chain_at_other_settings_encodes_nothing_again_and_draws_as_one_built_so() -> None:
    pipeline = tiny_stable_diffusion()
    chain = chain_over(pipeline, num_inference_steps=3, guidance_scale=3.0, height=32, width=24)
    first = chain.sample(PROMPTS, [0, 1])
    calls = []
    hook = pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    drawn = {}
    for eta, steps, guidance in ((0.0, None, None), (0.5, 5, None), (None, None, 2.0)):
        other = chain.at(eta=eta, steps=steps, guidance=guidance)
        drawn[eta, steps, guidance] = other.sample(PROMPTS, [0, 1]).latents
        assert other.denoiser_evaluations == 2 * other.num_steps
    assert not calls
    hook.remove()
    for (eta, steps, guidance), latents in drawn.items():
        built = chain_over(
            pipeline,
            num_inference_steps=steps or 3,
            eta=1.0 if eta is None else eta,
            guidance_scale=guidance or 3.0,
            height=32,
            width=24,
        )
        assert torch.equal(latents, built.sample(PROMPTS, [0, 1]).latents)
    assert (chain.num_steps, chain.arguments.eta, chain.denoiser_evaluations) == (3, 1.0, 6)
    assert torch.equal(chain.sample(PROMPTS, [0, 1]).latents, first.latents), "the first chain is as it was"


def test_denoiser_evaluations_are_counted() -> None:
    pipeline = tiny_stable_diffusion()
    rows = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    chain = chain_over(pipeline, num_inference_steps=3)
    trajectory = chain.sample(PROMPTS, [0, 1])
    chain.replay(trajectory, 2)
    chain.denoise(trajectory, 2, trajectory.latents[2])
    assert chain.denoiser_evaluations == sum(rows) // 2 == 2 * (3 + 1 + 2)  # a guided pair counts once


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_are_converted(scheduler: type) -> None:
    pipeline = tiny_stable_diffusion()
    reference = chain_over(pipeline, num_inference_steps=4).sample(PROMPTS, [0, 1])
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    converted = chain_over(pipeline, num_inference_steps=4).sample(PROMPTS, [0, 1])
    assert converted.stds == reference.stds
    assert torch.equal(converted.latents, reference.latents)


def test_half_precision_keeps_float32_latents() -> None:
    pipeline = tiny_stable_diffusion().to(torch.bfloat16)
    chain = chain_over(pipeline, num_inference_steps=3)
    trajectory = chain.sample(PROMPTS, [0, 1])
    assert trajectory.latents.dtype == torch.float32
    latents = trajectory.latents[0].clone().requires_grad_()
    images = chain.decode(latents, PROMPTS)
    (gradient,) = torch.autograd.grad(images.float().sum(), latents)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


def test_a_half_precision_denoiser_of_any_name_takes_float32_latents() -> None:
    pipeline = tiny_stable_diffusion().to(torch.bfloat16)
    pipeline.engine = copy.deepcopy(pipeline.unet)
    chain = chain_over(pipeline, num_inference_steps=2, denoisers=["engine"])
    latents = chain.draw_noises([0])[2]
    assert latents.dtype == torch.float32
    embeddings = torch.zeros(1, 4, pipeline.unet.config.cross_attention_dim)
    assert pipeline.engine(latents, 1, encoder_hidden_states=embeddings).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_with_a_scheduler_by_name_it_draws_as_the_pipeline_does_with_it(scheduler: type) -> None:
    """Its later noise included, and whatever the batch; the pipeline keeps its own scheduler."""
    pipeline = tiny_stable_diffusion()
    own = pipeline.scheduler
    looking = chain_over(pipeline, num_inference_steps=3, guidance_scale=3.0, negative_prompt="ugly").at(
        steps=4, scheduler=scheduler.__name__, whole=True
    )
    drawn = looking.draw(["red", "a blue b"], [11, 5])[0]
    assert pipeline.scheduler is own
    torch.testing.assert_close(looking.draw(["a blue b"], [5])[0], drawn[1:], rtol=1e-4, atol=1e-4)
    pipeline.scheduler = scheduler.from_config(own.config)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": ["ugly"], "output_type": "latent"}
    expected = pipeline(["red"], generator=torch.Generator().manual_seed(11), **options).images
    torch.testing.assert_close(drawn[:1], expected, rtol=1e-4, atol=1e-4)


def test_clear_errors() -> None:
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=True)
    with pytest.raises(ValueError, match="clip_sample=False"):
        chain_over(pipeline)
    chain = chain_over(tiny_stable_diffusion())
    for name in ("DPMSolver", "UNet2DConditionModel"):
        with pytest.raises(ValueError, match=f"a scheduler of diffusers, such as DPMSolverMultistepSched.*got {name}"):
            chain.at(scheduler=name, whole=True)
    with pytest.raises(ValueError, match="of the diffusion path, on which the model was trained, got FlowMatchEuler"):
        chain.at(scheduler="FlowMatchEulerDiscreteScheduler", whole=True)
    with pytest.raises(ValueError, match=r"denoiser of object: expected unet or transformer.*--denoiser"):
        chain_over(object())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ancestral", "cps", "flow-sde"])
def test_outside_its_window_a_chain_has_no_noise(kind: str) -> None:
    pipeline = tiny_stable_diffusion("v_prediction")
    whole = chain_over(pipeline, num_inference_steps=4, step_kind=kind)
    plain = chain_over(pipeline, num_inference_steps=4, step_kind="ode")
    windowed = chain_over(pipeline, num_inference_steps=4, step_kind=kind, noise_window=(2, 3))
    trajectory = windowed.sample(["a cat"], [0])
    for t in (1, 2, 3, 4):
        expected = whole if t in (2, 3) else plain
        step = windowed.replay(trajectory, t)
        assert torch.equal(step.mean, expected.replay(trajectory, t).mean) and windowed.std(t) == expected.std(t)
        assert torch.equal(step.next_latents(trajectory.noise(t)), trajectory.latents[t - 1])
        assert windowed.output_sensitivity(t) == expected.output_sensitivity(t)
    assert windowed.at(eta=0.5, whole=True).std(4) > 0, "images that are looked at have one eta"
