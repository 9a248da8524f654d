"""Every family's chain against the pipeline's own call, and against its own records."""

from collections.abc import Callable

import pytest
import torch

from tests.families.table import CASES, NUM_STEPS, VIDEOS, drawn_alone, load, prompts_of
from tests.pipelines import chain_over

SEEDS = [3, 4]
KINDS = ("ancestral", "flow-sde", "cps", "ode")


@pytest.mark.parametrize("name", CASES)
def test_without_noise_the_images_are_the_pipelines_own(name: str, folder_of: Callable[[str], str]) -> None:
    """The pipeline alone, told what the card tells: it draws its own noise from the same seeds, encodes its own prompts
    and steps the scheduler of diffusers that the chain names."""
    pipeline, prompts = load(folder_of(name)), prompts_of(name)
    for spacing in (None, "linspace"):
        options = {"eta": 0.0, "timestep_spacing": spacing, **CASES[name].options}
        chain = chain_over(pipeline, num_inference_steps=NUM_STEPS, **options)
        trajectory = chain.sample(prompts, SEEDS)
        with torch.no_grad():
            images = chain.decode(trajectory.latents[0], prompts)
        scheduler = chain.inference_scheduler()
        if (
            name in ("ltx", "ltx-i2v") and spacing == "linspace"
        ):  # it tells its scheduler noise levels, and cannot be told others
            assert "places 3 steps elsewhere" in (scheduler.difference or "")
            continue
        assert scheduler.difference is None
        expected = drawn_alone(pipeline, chain, prompts, SEEDS)
        assert images.std() > 0.01, "a constant image would prove nothing"
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_replay_is_bit_exact_with_every_kind_of_step(name: str, folder_of: Callable[[str], str]) -> None:
    pipeline, prompts = load(folder_of(name)), prompts_of(name)
    for kind in KINDS:
        chain = chain_over(pipeline, num_inference_steps=NUM_STEPS, step_kind=kind, eta=0.7, **CASES[name].options)
        assert (chain.std(2) > 0) == (kind != "ode")
        trajectory = chain.sample(prompts, SEEDS)
        for t in range(1, NUM_STEPS + 1):
            step = chain.replay(trajectory, t)
            assert torch.equal(step.next_latents(trajectory.noise(t)), trajectory.latents[t - 1]), (kind, t)
            assert torch.equal(step.pred_original_sample, trajectory.pred_original_samples[t - 1])
        assert torch.equal(chain.denoise(trajectory, 2, trajectory.latents[2]), trajectory.latents[0])


@pytest.mark.parametrize("name", [name for name in CASES if name != "sd-epsilon"])
def test_the_last_step_is_alive(name: str, folder_of: Callable[[str], str]) -> None:
    chain = chain_over(load(folder_of(name)), num_inference_steps=28, **CASES[name].options)
    assert chain.output_sensitivity(1) >= 0.05
    assert chain.last_step_warning() is None


@pytest.mark.parametrize(
    ("name", "spacing", "figure"),
    [("sd-epsilon", None, "0.021"), ("sd3", "linspace", "0.009"), ("sdxl", "leading", "")],
)
def test_a_dead_last_step_is_reported_with_its_figure(
    name: str, spacing: str | None, figure: str, folder_of: Callable[[str], str]
) -> None:
    pipeline, options = load(folder_of(name)), {"num_inference_steps": 50, **CASES[name].options}
    chain = chain_over(pipeline, timestep_spacing=spacing, **options)
    alive = chain_over(pipeline, timestep_spacing="trailing", **options)
    warning = chain.last_step_warning()
    assert f"|d x_0 / d output| = {chain.output_sensitivity(1):.3f}" in warning and figure in warning
    assert f"With --timestep_spacing trailing it is {alive.output_sensitivity(1):.3f}." in warning


@pytest.mark.parametrize("name", ["text-to-video-sd", "animatediff", "wan-2.1", "wan-i2v"])
def test_first_frames_alone_are_those_of_the_whole_video(name: str, folder_of: Callable[[str], str]) -> None:
    frames, prompts = 5 if name.startswith("wan") else 2, prompts_of(name)
    options = CASES[name].options | {"num_frames": 9}
    pipeline = load(folder_of(name))
    whole = chain_over(pipeline, num_inference_steps=2, **options)
    part = chain_over(pipeline, num_inference_steps=2, decoded_frames=frames, **options)
    looked_at = part.at(whole=True)
    latents = whole.sample(prompts, SEEDS).latents[0].requires_grad_()
    videos = whole.decode(latents, prompts)
    first = part.decode(latents, prompts)
    assert videos.shape[1] == 9 and first.shape[1] == frames
    assert torch.equal(looked_at.decode(latents, prompts), videos)
    torch.testing.assert_close(first, videos[:, :frames], rtol=0, atol=1e-5)
    expected = torch.autograd.grad(videos[:, :frames].sum(), latents)[0]
    torch.testing.assert_close(torch.autograd.grad(first.sum(), latents)[0], expected, rtol=1e-4, atol=1e-4)


def test_first_frames_are_refused_where_they_are_not_exact(folder_of: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match=r"CogVideoXPipeline does not decode first frames alone.*--decoded_frames"):
        chain_over(load(folder_of("cogvideox")), decoded_frames=1, **CASES["cogvideox"].options)
    with pytest.raises(ValueError, match=r"1, 5, 9, \.\.\. frames, got 3; use 1 or 5"):
        chain_over(load(folder_of("wan-2.1")), decoded_frames=3, **CASES["wan-2.1"].options)
    with pytest.raises(ValueError, match=r"at most the 5 frames of the video, got 9; lower --decoded_frames"):
        chain_over(load(folder_of("wan-2.1")), decoded_frames=9, **CASES["wan-2.1"].options)


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_have_frames(name: str, folder_of: Callable[[str], str]) -> None:
    options = CASES[name].options
    chain, prompts = chain_over(load(folder_of(name)), num_inference_steps=2, **options), prompts_of(name)[1:]
    latents = chain.sample(prompts, [0]).latents[0]
    with torch.no_grad():
        videos = chain.decode(latents, prompts)
    assert videos.shape == (1, options["num_frames"], 3, options["height"], options["width"])
    assert videos.min() >= 0 and videos.max() <= 1


@pytest.mark.parametrize("name", CASES)
def test_half_precision_keeps_float32_latents_and_gradients(name: str, folder_of: Callable[[str], str]) -> None:
    chain = chain_over(load(folder_of(name), torch.bfloat16), num_inference_steps=2, **CASES[name].options)
    prompts = prompts_of(name)
    trajectory = chain.sample(prompts, SEEDS)
    assert trajectory.latents.dtype == torch.float32
    rounded = trajectory.latents[:2].bfloat16().float()
    assert not torch.equal(trajectory.latents[:2], rounded), "the pipeline must not round them on entry"
    for t in (1, 2):
        assert torch.equal(chain.replay(trajectory, t).next_latents(trajectory.noise(t)), trajectory.latents[t - 1])
    latents = trajectory.latents[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(chain.decode(latents, prompts).float().sum(), latents)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


def test_sound_is_sampled_beside_its_video_and_not_decoded_for_the_reward(folder_of: Callable[[str], str]) -> None:
    pipeline, options = load(folder_of("ltx-2")), CASES["ltx-2"].options
    chain, prompts = chain_over(pipeline, num_inference_steps=2, eta=0.7, **options), prompts_of("ltx-2")
    trajectory = chain.sample(prompts, SEEDS)
    latents = trajectory.latents[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(chain.decode(latents, prompts).sum(), latents)
    pictures = 3 * 16 * 16  # latent frames of 5 frames, and of 32 pixels
    assert chain.latents_shape == (pictures + 5, 4), "25 latent frames of sound a second"
    assert gradient[:, :pictures].abs().sum() > 0 and not gradient[:, pictures:].any()
    other = trajectory.latents[1].clone()
    other[:, pictures:] += 1.0
    changed = chain.replay(trajectory, 1, other).mean - chain.replay(trajectory, 1).mean
    assert changed[:, :pictures].abs().max() > 1e-6, "pictures hear their sound in the transformer"
    with pytest.raises(ValueError, match="LTX2Pipeline returns a video's latents without those of its sound"):
        chain.at(scheduler="FlowMatchEulerDiscreteScheduler")
    pipeline.duration_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="choose another length for every prompt: give --num_frames"):
        chain_over(pipeline, num_inference_steps=2, **{**options, "num_frames": None})
