"""Features by which sets of images are compared: which are chosen, and that they are the networks' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from rlr_peft.compare import RewardFeatures, Thumbnails, VisionModelFeatures, find_features
from rlr_peft.errors import RewardError
from rlr_peft.rewards import (
    HeldoutRewards,
    Metadata,
    ModelSettings,
    SeeingReward,
    Term,
    WeightedRewards,
    load_judge,
    load_reward,
)

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))


class Seeing(SeeingReward):
    """A reward with a network that sees one number, the mean of a channel."""

    def __init__(self, name: str, channel: int) -> None:
        super().__init__(name, ModelSettings(), torch.nn.Identity())
        self.channel = channel

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Metadata) -> torch.Tensor:
        return self.features(images)[:, 0]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, self.channel].mean((1, 2))[:, None]


def test_on_tiny_shapes_the_held_out_judge_sees() -> None:
    images = torch.rand(2, 3, 64, 64)
    features = find_features("auto", "tiny-shapes", [load_reward("tiny-shapes")])
    judge = load_judge("heldout")
    with torch.no_grad():
        assert torch.equal(features(images), judge.trunk(images * 2 - 1))
        assert torch.allclose(judge(images)["color"], judge.heads["color"](features(images)).log_softmax(1))
    assert features.name == "network of the reward tiny-shapes-heldout"


def test_elsewhere_the_last_reward_that_sees_is_taken() -> None:
    red, green, blind = Seeing("red", 0), Seeing("green", 1), load_reward("jpeg-compressibility")
    for rewards, expected in (
        ([red, blind], red),
        ([red, green], green),
        ([WeightedRewards([Term(red, 1.0), Term(blind, 1.0)]), HeldoutRewards([blind, green])], green),
        ([WeightedRewards([Term(red, 1.0), Term(blind, 1.0)]), blind], red),
    ):
        found = find_features("auto", "some/base", rewards)
        assert isinstance(found, RewardFeatures) and found.name == f"network of the reward {expected.name}"
        assert torch.equal(found(IMAGES), expected.features(IMAGES))
    assert isinstance(find_features("auto", "some/base", [blind]), Thumbnails)
    assert isinstance(find_features("thumbnails", "tiny-shapes", [red]), Thumbnails)


def test_thumbnails_are_means_of_tiles() -> None:
    image = torch.arange(32.0).repeat(3, 32, 1)[None] / 31
    thumbnail = Thumbnails()(image).reshape(3, 16, 16)
    assert thumbnail[0, 0].tolist() == pytest.approx([(2 * i + 0.5) / 31 - 0.5 for i in range(16)], abs=1e-6)


def test_a_videos_features_are_the_mean_over_its_frames() -> None:
    videos = torch.rand(2, 3, 3, 20, 20)
    torch.testing.assert_close(Thumbnails()(videos), torch.stack([Thumbnails()(video).mean(0) for video in videos]))


def save(folder: Path, model: Any) -> str:
    model.eval().save_pretrained(folder)
    return str(folder)


def test_clips_projected_embedding(tmp_path: Path) -> None:
    """Of the preprocessing that is published with CLIP, up to its rounding to 8 bits."""
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, image_size=32, patch_size=8, projection_dim=12))
    features = VisionModelFeatures(save(tmp_path / "clip", model), ModelSettings())
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pictures = [numpy.round(image.permute(1, 2, 0).numpy() * 255).astype(numpy.uint8) for image in IMAGES]
    with torch.no_grad():
        expected = model(**processor(pictures, return_tensors="pt")).image_embeds
    assert features(IMAGES).shape == (3, 12) and features.name == "clip"
    cosine = torch.nn.functional.cosine_similarity(features(IMAGES), expected)
    assert cosine.min() > 0.999


@pytest.mark.parametrize(
    "build",
    [
        lambda: ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False),
        lambda: Dinov2Model(
            Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
        ),
    ],
    ids=["ViT", "DINOv2"],
)
def test_class_tokens_of_vits(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build()
    features = VisionModelFeatures(save(tmp_path / "vit", model), ModelSettings())
    found = features(IMAGES)
    assert found.shape == (3, 16)
    assert torch.equal(features(IMAGES), found)
    side = model.config.image_size
    square = torch.rand(1, 3, side, side)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        expected = model.eval()(pixel_values=(square - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(features(square), expected, atol=1e-5, rtol=1e-5)


def test_a_model_of_texts_is_refused(tmp_path: Path) -> None:
    model = BertModel(BertConfig(**SMALL, vocab_size=10))
    with pytest.raises(RewardError, match=r"expected a model of type clip, .*, got bert"):
        find_features(save(tmp_path / "bert", model), "some/base", [])


def test_a_model_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"needs the file .* of the Hub repository some/vision-model"):
        find_features("some/vision-model", "some/base", [], ModelSettings())
