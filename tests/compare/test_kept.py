"""What is kept is found again, bit for bit; what is damaged, incomplete or of something else is not."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from rlr_peft.compare import KeptFeatures, KeptImages, KeptReward, Thumbnails, image_setup, kept_divergence
from rlr_peft.config import config_from_dict
from rlr_peft.errors import RewardError
from rlr_peft.prompt import Prompt
from rlr_peft.rewards import RemoteReward, Reward, RewardServer, Scored, measure_images
from tests.programs import serving

PROMPTS, SEEDS = [Prompt("a cat"), Prompt("a dog, “quoted” 日本")], [7, 4294967295]


class Draw:
    """Counts its calls; images depend on prompt and seed."""

    def __init__(self, *shape: int) -> None:
        self.calls = 0
        self.shape = shape

    def __call__(self, prompts: list[Prompt], seeds: list[int]) -> Tensor:
        self.calls += 1
        generators = [torch.Generator().manual_seed(seed + len(prompt.text)) for prompt, seed in zip(prompts, seeds)]
        return torch.stack([torch.rand(self.shape, generator=generator) for generator in generators])


@pytest.mark.parametrize("shape", [(3, 9, 7), (5, 3, 6, 4)], ids=["images", "videos"])
def test_images_are_drawn_once_and_come_back_as_they_were(tmp_path: Path, shape: tuple[int, ...]) -> None:
    draw = Draw(*shape)
    first = KeptImages(tmp_path, draw)(PROMPTS, SEEDS)
    again = KeptImages(tmp_path, draw)(PROMPTS, SEEDS)
    assert draw.calls == 1 and first.shape == (2, *shape)
    assert torch.equal(first, again)
    assert torch.equal((first * 255).round() / 255, first) and (first - draw(PROMPTS, SEEDS)).abs().max() <= 0.5 / 255
    assert not list(tmp_path.glob(".writing-*"))


def test_a_kept_image_is_a_png_that_names_its_prompt(tmp_path: Path) -> None:
    kept = KeptImages(tmp_path, Draw(3, 9, 7))
    kept(PROMPTS, SEEDS)
    with Image.open(kept.path(PROMPTS[1], SEEDS[1])) as picture:
        assert (picture.format, picture.size) == ("PNG", (7, 9))
        assert (picture.info["prompt"], picture.info["seed"]) == (PROMPTS[1].text, str(SEEDS[1]))


def test_another_prompt_or_seed_is_another_image(tmp_path: Path) -> None:
    draw = Draw(3, 8, 8)
    kept = KeptImages(tmp_path, draw)
    kept(PROMPTS, SEEDS)
    kept([Prompt("a bat"), PROMPTS[1]], SEEDS)
    kept(PROMPTS, [8, SEEDS[1]])
    assert draw.calls == 3


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change_a_pixel(path: Path) -> None:
    """A whole PNG with all its notes, of another image."""
    with Image.open(path) as picture:
        notes = PngImagePlugin.PngInfo()
        for name, value in picture.info.items():
            notes.add_itxt(str(name), str(value))
        changed = picture.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(path, pnginfo=notes)


@pytest.mark.parametrize("damage", [Path.unlink, cut_in_half, change_a_pixel, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 3, 8, 8)], ids=["image", "frame"])
def test_a_batch_of_which_anything_is_not_whole_is_drawn_again(
    tmp_path: Path, damage: Any, shape: tuple[int, ...]
) -> None:
    draw = Draw(*shape)
    kept = KeptImages(tmp_path, draw)
    first = kept(PROMPTS, SEEDS)
    damage(sorted(tmp_path.iterdir())[-1])
    again = kept(PROMPTS, SEEDS)
    assert draw.calls == 2 and torch.equal(first, again)
    kept(PROMPTS, SEEDS)
    assert draw.calls == 2, "mended"


class Redness(Reward):
    name = "redness"
    differentiable = True

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        self.calls += 1
        some = torch.tensor([1.0] + [math.nan] * (len(images) - 1))
        return Scored(images[:, 0].mean((1, 2)), info={"blue/mean": images[:, 2].mean((1, 2)), "some": some})


def test_scores_and_info_are_measured_once(tmp_path: Path) -> None:
    images, reward = Draw(3, 8, 8)(PROMPTS, SEEDS), Redness()
    plain = measure_images(reward, images, PROMPTS)
    first, again = (measure_images(KeptReward(reward, tmp_path, "v1"), images, PROMPTS) for _ in range(2))
    assert reward.calls == 2
    for scored in (first, again):
        assert torch.equal(scored.scores, plain.scores)
        assert scored.info.keys() == plain.info.keys()
        assert torch.equal(scored.info["blue/mean"], plain.info["blue/mean"])
        assert torch.isnan(scored.info["some"]).tolist() == [False, True]


def test_other_images_prompts_metadata_or_rewards_are_measured(tmp_path: Path) -> None:
    images, reward = Draw(3, 8, 8)(PROMPTS, SEEDS), Redness()
    kept = KeptReward(reward, tmp_path, "v1")
    measure_images(kept, images, PROMPTS)
    measure_images(kept, images.flip(0), PROMPTS)
    measure_images(kept, images, PROMPTS[::-1])
    measure_images(kept, images, PROMPTS, [{"style": "ink"}, {}])
    measure_images(KeptReward(reward, tmp_path, "v2"), images, PROMPTS)
    assert reward.calls == 5 and len(list(tmp_path.iterdir())) == 5


def test_damaged_numbers_are_measured_again(tmp_path: Path) -> None:
    images, reward = Draw(3, 8, 8)(PROMPTS, SEEDS), Redness()
    kept = KeptReward(reward, tmp_path, "v1")
    first = measure_images(kept, images, PROMPTS).scores
    (file,) = tmp_path.iterdir()
    cut_in_half(file)
    assert torch.equal(measure_images(kept, images, PROMPTS).scores, first) and reward.calls == 2


def test_scores_of_a_server_are_found_again_under_its_version_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, reward = Draw(3, 8, 8)(PROMPTS, SEEDS), Redness()

    def measure(url: str) -> Tensor:
        return measure_images(KeptReward(RemoteReward(url), tmp_path, url), images, PROMPTS).scores

    with serving(RewardServer(reward, "127.0.0.1", 0, version="v1")) as server:
        first = measure(server.url)
        assert torch.equal(measure(server.url), first) and reward.calls == 1 and not caplog.messages
        server.stated["version"] = "v2"
        measure(server.url)
        assert reward.calls == 2, "measured again"
        measure(server.url)
        assert reward.calls == 2, "and kept under the new version"
        del server.stated["version"]
        measure(server.url)
        assert reward.calls == 2
    assert torch.equal(measure(server.url), first), "nobody there: as good as a server that says nothing"
    name, here = server.url.removeprefix("http://").strip("/"), tmp_path
    silent = (
        f"Reward server '{name}' does not say which version it is: its scores in {here} are taken as they are. If it "
        "has changed since, delete that folder."
    )
    assert caplog.messages == [
        f"Reward server '{name}' is of version v2 now: its scores in {here} are of version v1, and are measured again.",
        *(silent, silent),
    ]


def test_a_server_that_changes_between_two_answers_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    images = Draw(3, 8, 8)(PROMPTS, SEEDS)
    with serving(RewardServer(Redness(), "127.0.0.1", 0, version="v1")) as server:
        reward = RemoteReward(server.url)
        for version in ("v1", "v1", "v2", "v2"):
            server.stated["version"] = version
            measure_images(reward, images, PROMPTS)
        del server.stated["version"]
        measure_images(reward, images, PROMPTS)
    changed = (
        f"Reward server '{reward.name}' has changed: it is of version %s now and was of %s. Scores from before and "
    )
    assert [message.partition("after")[0] for message in caplog.messages] == [
        changed % ("v2", "v1"),
        changed % ("an unknown one", "v2"),
    ]


def test_a_failing_reward_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken(Redness):
        def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
            return Scored(images[:, 0].mean((1, 2)) / 0)

    with pytest.raises(RewardError, match="reward 'redness': expected finite scores"):
        measure_images(KeptReward(Broken(), tmp_path, "v1"), Draw(3, 8, 8)(PROMPTS, SEEDS), PROMPTS)
    assert not list(tmp_path.iterdir())


def test_features_and_divergences_are_kept_too(tmp_path: Path) -> None:
    images = Draw(2, 3, 20, 20)(PROMPTS, SEEDS)
    first, again = (KeptFeatures(Thumbnails(), tmp_path, "thumbnails")(images) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (2, 3 * 16 * 16)
    asked: list[list[int]] = []

    def measure(prompts: list[Prompt], seeds: list[int]) -> Tensor:
        asked.append(seeds)
        return torch.tensor(seeds) / 3

    for identity in ("one", "one", "two"):
        found = kept_divergence(measure, tmp_path, identity)(PROMPTS, SEEDS)
        assert torch.equal(found, torch.tensor(SEEDS) / 3)
    assert asked == [SEEDS, SEEDS]


def test_other_sources_of_the_same_stage_prompts_are_other_images() -> None:
    """`dcot_form auto` takes the contrast of what the rules split, and the parts of what a column has."""
    values = {"pretrained_model_name_or_path": "tiny-shapes", "prompt_path": "scenes", "reward_fn": "aesthetic"}
    sources = {"dcot_rules": True}, {"dcot_columns": ["coarse", "mid", "fine"]}
    pipeline: Any = object()
    rules, columns = (image_setup(config_from_dict(values | source), pipeline)["stages"] for source in sources)
    assert rules != columns
