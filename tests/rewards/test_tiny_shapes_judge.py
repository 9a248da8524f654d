"""The judges as rewards: the arithmetic with untrained judges, the meaning with the shipped ones."""

import numpy as np
import pytest
import torch

from benchmarks.tiny_shapes.drawing import draw
from rlr_peft.errors import RewardError
from rlr_peft.rewards import (
    HALF_SCORE_SURPRISE,
    JUDGE_NAMES,
    JudgeName,
    Reward,
    create_judge,
    load_reward,
    measure_images,
    score_images,
)
from rlr_peft.tiny_shapes import ATTRIBUTES, parse_caption, scenes_of

PROMPT = "a large red striped star with no outline in the center on a navy background"


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A judge with random weights in place of the shipped one: same code, no meaning."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        judge = create_judge("reward").eval().requires_grad_(False)
    monkeypatch.setattr("rlr_peft.rewards.embedded.load_judge", lambda name: judge)
    return judge


def random_images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def score_of(log_probability: torch.Tensor) -> torch.Tensor:
    """c / (c + surprise), written out independently."""
    return 1 / (1 - log_probability / HALF_SCORE_SURPRISE)


def test_the_score_is_the_mean_over_the_named_values(untrained: torch.nn.Module) -> None:
    images, prompts = random_images(2), [PROMPT, "a blue ring"]
    log_probabilities = untrained(images)
    expected = []
    for index, prompt in enumerate(prompts):
        asked = parse_caption(prompt)
        values = [
            score_of(log_probabilities[name][index][ATTRIBUTES[name].index(value)]).item()
            for name, value in asked.items()
        ]
        expected.append(sum(values) / len(values))
    assert len(parse_caption(prompts[0])) == 7
    assert score_images(load_reward("tiny-shapes"), images, prompts).tolist() == pytest.approx(expected, rel=1e-5)


def test_info_tells_every_attribute_apart(untrained: torch.nn.Module) -> None:
    """Their mean over what a prompt names is the score; what it does not name has no number."""
    scored = measure_images(load_reward("tiny-shapes"), random_images(2), [PROMPT, "a blue ring"])
    assert list(scored.info) == [*ATTRIBUTES, "all_right"]
    table = torch.stack([scored.info[name] for name in ATTRIBUTES])
    torch.testing.assert_close(table.nanmean(0), scored.scores)
    assert [name for name in ATTRIBUTES if scored.info[name][1].isnan()] == [
        name for name in ATTRIBUTES if name not in ("shape", "color")
    ]
    assert measure_images(load_reward("tiny-shapes/color"), random_images(1), [PROMPT]).info == {}


def test_all_right_is_one_where_every_named_attribute_is_read_as_asked(untrained: torch.nn.Module) -> None:
    images = random_images(1)
    read = {name: ATTRIBUTES[name][int(values.argmax())] for name, values in untrained(images).items()}
    as_read = f"a {read['color']} {read['shape']}"
    other = next(value for value in ATTRIBUTES["color"] if value != read["color"])
    prompts = [as_read, f"a {other} {read['shape']}", f"a {read['shape']}"]
    scored = measure_images(load_reward("tiny-shapes"), images.expand(3, -1, -1, -1), prompts)
    assert scored.info["all_right"].tolist() == [1, 0, 1]


def test_one_attribute_alone(untrained: torch.nn.Module) -> None:
    images = random_images(1)
    expected = score_of(untrained(images)["texture"][0][ATTRIBUTES["texture"].index("striped")]).item()
    reward = load_reward("tiny-shapes-heldout/texture")
    assert reward.name == "tiny-shapes-heldout/texture"
    assert score_images(reward, images, [PROMPT]).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_equal_central_differences(untrained: torch.nn.Module) -> None:
    untrained.double()
    reward = load_reward("tiny-shapes")
    images = random_images(1).double()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def score(at: torch.Tensor) -> torch.Tensor:
        # Through the judge in float64: float32 scores are too coarse for a difference.
        judged = untrained(at)
        asked = parse_caption(PROMPT)
        return torch.stack(
            [score_of(judged[name][0, ATTRIBUTES[name].index(value)]) for name, value in asked.items()]
        ).mean()

    difference = (score(images + 1e-5 * direction) - score(images - 1e-5 * direction)) / 2e-5
    untrained.float()
    leaf = images.float().requires_grad_()
    (gradient,) = torch.autograd.grad(score_images(reward, leaf, [PROMPT]).sum(), leaf)
    assert (gradient.double() * direction).sum().item() == pytest.approx(difference.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "prompt", "message"),
    [
        (
            "tiny-shapes",
            "a photo of a cat",
            r"cannot read the prompt of sample 1 \"a photo of a cat\".*unknown word 'photo'",
        ),
        ("tiny-shapes", "a shape", "names no attribute at all"),
        (
            "tiny-shapes/texture",
            "a red star",
            r"sample 1 \"a red star\" does not name the attribute 'texture'.*striped",
        ),
        ("tiny-shapes", "a red blue star", "color is both"),
    ],
)
def test_prompts_that_cannot_be_judged(untrained: torch.nn.Module, spec: str, prompt: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_images(load_reward(spec), random_images(2), [PROMPT, prompt])


def drawings(count: int) -> tuple[torch.Tensor, list[str]]:
    chosen = scenes_of("test")[:count]
    rng = np.random.default_rng(0)
    pixels = np.stack([draw(scene, rng) for scene in chosen])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, [scene.caption() for scene in chosen]


@pytest.fixture(params=JUDGE_NAMES)
def shipped(request: pytest.FixtureRequest) -> Reward:
    name: JudgeName = request.param
    return load_reward({"reward": "tiny-shapes", "heldout": "tiny-shapes-heldout"}[name])


def test_the_right_drawing_scores_highest(shipped: Reward) -> None:
    images, prompts = drawings(24)
    count = len(prompts)
    table = torch.stack([score_images(shipped, images, [prompt] * count) for prompt in prompts])
    assert (table >= 0).all()
    assert (table <= 1).all()
    assert table.argmax(dim=1).tolist() == list(range(count))
    assert table.diagonal().mean() > 0.95


def test_one_wrong_attribute_costs_up_to_its_share(shipped: Reward) -> None:
    images, _ = drawings(1)
    right = scenes_of("test")[0]
    other = next(texture for texture in ATTRIBUTES["texture"] if texture != right.texture)
    wrong = right.caption().replace(right.texture, other)
    difference = score_images(shipped, images, [right.caption()]) - score_images(shipped, images, [wrong])
    assert 0.4 / 7 < difference.item() <= 1 / 7


def test_the_gradient_reaches_every_image_and_climbs(shipped: Reward) -> None:
    images, prompts = drawings(8)
    asked = prompts[1:] + prompts[:1]  # wrong prompts: there is something to climb
    leaf = images.clone().requires_grad_()
    scores = score_images(shipped, leaf, asked)
    (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    assert torch.isfinite(gradient).all()
    sizes = gradient.flatten(1).norm(dim=1)
    assert (sizes > 0).all()
    climbed = images + 1e-2 * gradient / sizes[:, None, None, None]
    assert score_images(shipped, climbed, asked).mean() > scores.mean()
