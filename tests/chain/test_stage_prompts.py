"""Every step is conditioned on the prompt of its stage, when sampling, replaying and rolling on alike."""

import pytest
import torch

from rlr_peft.chain import DenoisingChain
from rlr_peft.prompt import Prompt, make_stages
from tests.pipelines import chain_over, tiny_stable_diffusion

STAGES = make_stages(("early", "middle", "late"), (0.4, 0.2, 0.4))  # of 5 steps: 5-4, 3, 2-1
TEXTS = ("a sky", "a boat", "red sails")
SEEDS = [3, 4]


def chain(**options) -> DenoisingChain:
    options = {"num_inference_steps": 5, "eta": 0.7, "guidance_scale": 3.0} | options
    return chain_over(tiny_stable_diffusion("v_prediction", timestep_spacing="trailing"), **options)


@pytest.fixture(scope="module")
def staged() -> DenoisingChain:
    return chain(stages=STAGES)


@pytest.fixture(scope="module")
def plain() -> DenoisingChain:
    return chain()


def test_sampling_is_one_plain_chain_after_the_other(staged: DenoisingChain, plain: DenoisingChain) -> None:
    """By hand, with the same noises: x_5 to x_3 with the first text, to x_2 with the second, to x_0 with the third."""
    trajectory = staged.sample([Prompt("whole", stages=TEXTS)] * 2, SEEDS)
    latents = trajectory.latents[5]
    for text, start, stop in zip(TEXTS, (5, 3, 2), (3, 2, 0), strict=True):
        of_text = plain.sample([text] * 2, SEEDS, trajectory.noises)
        latents = plain.denoise(of_text, start, latents, stop)
        assert torch.equal(latents, trajectory.latents[stop]), text
    assert not torch.equal(latents, plain.sample(["whole"] * 2, SEEDS).latents[0])


def test_replays_and_rollouts_see_the_text_of_their_step(staged: DenoisingChain) -> None:
    trajectory = staged.sample([Prompt("whole", stages=TEXTS), "no stages"], SEEDS)
    for t in range(1, 6):
        step = staged.replay(trajectory, t)
        assert torch.equal(step.next_latents(trajectory.noise(t)), trajectory.latents[t - 1]), t
        assert torch.equal(staged.denoise(trajectory, t, trajectory.latents[t]), trajectory.latents[0]), t
    assert torch.equal(staged.denoise(trajectory, 4, trajectory.latents[4], 2), trajectory.latents[2])


def test_prompts_without_stages_are_drawn_as_ever(staged: DenoisingChain, plain: DenoisingChain) -> None:
    mixed = staged.sample(["a sky", Prompt("whole", stages=TEXTS)], SEEDS)
    assert torch.equal(mixed.latents[:, :1], plain.sample(["a sky", "a boat"], SEEDS).latents[:, :1])
    same = staged.sample([Prompt("whole", stages=("a sky",) * 3)] * 2, SEEDS)
    assert torch.equal(same.latents, plain.sample(["a sky"] * 2, SEEDS).latents)


def test_evaluations_are_counted_once(staged: DenoisingChain) -> None:
    before = staged.denoiser_evaluations
    staged.sample([Prompt("whole", stages=TEXTS)] * 2, SEEDS)
    assert staged.denoiser_evaluations - before == 2 * 5


def test_a_prompts_own_negative_prompt_holds_in_every_stage(staged: DenoisingChain) -> None:
    prompts = [Prompt("whole", "blurry", stages=TEXTS), Prompt("whole", stages=TEXTS)]
    expected = chain(stages=STAGES, negative_prompt="blurry").sample([Prompt("whole", stages=TEXTS)] * 2, SEEDS)
    drawn = staged.sample(prompts, SEEDS)
    assert torch.equal(drawn.latents[:, 0], expected.latents[:, 0])
    assert not torch.equal(drawn.latents[0, 1], expected.latents[0, 1])


def test_the_wrong_number_of_stage_prompts(staged: DenoisingChain, plain: DenoisingChain) -> None:
    with pytest.raises(ValueError, match="Expected stage prompts for early, middle, late; got 2 with the prompt 'x'"):
        staged.sample([Prompt("x", stages=("a", "b"))], [0])
    with pytest.raises(ValueError, match="the chain was built without stages"):
        plain.sample([Prompt("x", stages=TEXTS)], [0])
    with pytest.raises(ValueError, match="at least one of the 2 steps for every stage"):
        chain(stages=STAGES, num_inference_steps=2)
