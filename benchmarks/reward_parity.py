"""How far our reward models are from the published ones, on random weights in the published files.

    python -m benchmarks.reward_parity

The published way is 8-bit images through PIL and the model under its original names; ours is torch from pixels to
score. `network` is the largest difference of scores on the same preprocessed pixels, `whole` from the same images.
Random networks stretch differences of pixels otherwise than trained ones do, so read both against `spread`, the
standard deviation of the scores. Writes ``benchmarks/results/reward_parity.json``.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPImageProcessorPil, CLIPTokenizer, SiglipImageProcessorPil

from benchmarks import reward_checkpoints as checkpoints
from benchmarks.large_parity import detector_parity, unified_parity, videoreward_parity
from benchmarks.machine import write_results
from benchmarks.reward_checkpoints import Sizes
from benchmarks.vlm_parity import KINDS, hpsv3_parity, judge_parity
from rlr_peft.rewards import (
    CLIP_MEAN,
    CLIP_STD,
    ModelFiles,
    ModelSettings,
    RewardSettings,
    clip_pixels,
    load_reward,
    padded_clip_pixels,
    score_images,
    squared_pixels,
)
from rlr_peft.rewards.model_files import (
    AESTHETIC_HEAD,
    AESTHETIC_V2_5_HEAD,
    BERT,
    DINO,
    HPSV2,
    IMAGE_REWARD,
    LAION_CLIP,
    OPENAI_CLIP,
    PICKSCORE,
    SIGLIP,
)

PROMPTS = ["a red fox", "two boats at sea, oil on canvas", "x", "an Owl  reading a very long book " * 9]
SHAPES = [(512, 512), (300, 500), (640, 384), (224, 224), (97, 180)]


def mixed_images(shape: tuple[int, int], count: int, seed: int = 0) -> list[Image.Image]:
    """8-bit images with smooth parts, noise and hard edges."""
    generator = numpy.random.default_rng(seed)
    y, x = numpy.mgrid[: shape[0], : shape[1]] / 40
    images = []
    for number in range(count):
        colors = generator.uniform(0, 1, (3, 2))
        waves = numpy.stack([0.5 + 0.5 * numpy.sin(a * 9 * x + b * 7 * y + number) for a, b in colors], -1)
        edges = (((x * 7).astype(int) + (y * 5).astype(int)) % 2)[..., None] * numpy.ones(3)
        noise = generator.uniform(0, 1, (*shape, 3))
        mixed = numpy.where(x[..., None] < x.mean(), waves, numpy.where(y[..., None] < y.mean(), edges, noise))
        images.append(Image.fromarray((mixed * 255).round().astype(numpy.uint8)))
    return images


def to_tensor(images: list[Image.Image]) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def published_clip_pixels(images: list[Image.Image], size: int) -> Tensor:
    """Through CLIPImageProcessor: PIL's resize, centre crop, normalisation."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    pixels: Tensor = processor(images=images, return_tensors="pt").pixel_values
    return pixels


def published_siglip_pixels(images: list[Image.Image], size: int) -> Tensor:
    """Through SiglipImageProcessor: PIL's resize without regard to the shape, normalisation."""
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    pixels: Tensor = processor(images, return_tensors="pt").pixel_values
    return pixels


def published_hps_pixels(images: list[Image.Image], size: int) -> Tensor:
    """Floats resized to the longest side by PIL (its "F" images know no clamping), centred on black, normalised."""
    batch = []
    for image in images:
        scale = size / max(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
        canvas = numpy.zeros((size, size, 3), numpy.float32)
        top, left = (size - height) // 2, (size - width) // 2
        for channel in range(3):
            plane = Image.fromarray(numpy.asarray(image)[..., channel].astype(numpy.float32) / 255)
            resized = numpy.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
            canvas[top : top + height, left : left + width, channel] = resized
        mean, std = (numpy.array(values, numpy.float32) for values in (CLIP_MEAN, CLIP_STD))
        batch.append((canvas - mean) / std)
    return torch.from_numpy(numpy.stack(batch)).permute(0, 3, 1, 2)


# What takes the place of the published preprocessing, by the same 8-bit images as tensors.
OURS: dict[Callable[..., Tensor], Callable[[Tensor, int], Tensor]] = {
    published_clip_pixels: clip_pixels,
    published_hps_pixels: padded_clip_pixels,
    published_siglip_pixels: squared_pixels,
}


def preprocessing_parity() -> dict[str, dict[str, float]]:
    """Largest and mean difference of normalised pixels, over sizes from small to large, at 224."""
    routes = {"clip": published_clip_pixels, "hpsv2": published_hps_pixels, "siglip": published_siglip_pixels}
    results = {}
    for name, published in routes.items():
        parts = []
        for shape in SHAPES:
            images = mixed_images(shape, 2)
            parts.append((published(images, 224) - OURS[published](to_tensor(images), 224)).abs().flatten())
        differences = torch.cat(parts)
        results[name] = {"largest": float(differences.max()), "mean": float(differences.mean())}
    return results


@torch.no_grad()
def network_parity(folder: Path, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Differences of scores for every image reward.

    Args:
        folder: receives the checkpoints.
        sizes: of the networks.
    """
    torch.manual_seed(0)
    openai = checkpoints.write_clip(folder / "openai", sizes, eos_token_id=2)
    pickscore = checkpoints.write_clip(folder / "pickscore", sizes, act="gelu")
    checkpoints.write_clip_tokenizer(folder / "laion")
    head = checkpoints.write_aesthetic_head(folder / "head", sizes.projection)
    hps = {
        version: checkpoints.write_hpsv2(folder / "hps", sizes, file)
        for version, file in (("v2.0", "HPS_v2_compressed.pt"), ("v2.1", "HPS_v2.1_compressed.pt"))
    }
    blip = checkpoints.write_image_reward(folder / "blip", folder / "bert", sizes)
    checkpoints.write_dino(folder / "dino", sizes)
    siglip, siglip_head = checkpoints.write_siglip(folder / "siglip", folder / "aesthetic_predictor_v2_5.pth", sizes)

    def clip_ids(tokenizer: Path, padding: int | None = None) -> Tensor:
        tokens = CLIPTokenizer.from_pretrained(tokenizer)(
            PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        return tokens.input_ids if padding is None else tokens.input_ids.where(tokens.attention_mask == 1, padding)

    def cosine(model: Any, tokenizer: Path) -> Callable[[Tensor], Tensor]:
        return lambda pixels: F.cosine_similarity(
            model.get_image_features(pixel_values=pixels).pooler_output,
            model.get_text_features(input_ids=clip_ids(tokenizer)).pooler_output,
        )

    def aesthetic(pixels: Tensor) -> Tensor:
        x = F.normalize(openai.get_image_features(pixel_values=pixels).pooler_output)
        for number in (0, 2, 4, 6, 7):
            x = F.linear(x, head[f"layers.{number}.weight"], head[f"layers.{number}.bias"])
        return x[:, 0]

    def aesthetic_v2_5(pixels: Tensor) -> Tensor:
        x = F.normalize(siglip.vision_model(pixel_values=pixels).pooler_output)
        for number in (0, 2, 4, 6, 8):
            x = F.linear(x, siglip_head[f"scoring_head.{number}.weight"], siglip_head[f"scoring_head.{number}.bias"])
        return x[:, 0]

    def image_reward(pixels: Tensor) -> Tensor:
        tokens = BertTokenizer.from_pretrained(folder / "bert", do_lower_case=True)(
            PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        scores: Tensor = blip(pixels, tokens.input_ids, tokens.attention_mask)
        return scores

    # open_clip pads with zeros, which must not matter.
    published: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
        "aesthetic": (published_clip_pixels, aesthetic),
        "aesthetic-v2.5": (published_siglip_pixels, aesthetic_v2_5),
        "clipscore": (published_clip_pixels, lambda p: 100 * cosine(openai, folder / "openai")(p)),
        "pickscore": (
            published_clip_pixels,
            lambda p: pickscore.logit_scale.exp() * cosine(pickscore, folder / "laion")(p),
        ),
        "hpsv2/v2.0": (published_hps_pixels, lambda p: hps["v2.0"](p, clip_ids(folder / "laion", 0))),
        "hpsv2/v2.1": (published_hps_pixels, lambda p: hps["v2.1"](p, clip_ids(folder / "laion", 0))),
        "imagereward": (published_clip_pixels, image_reward),
    }
    settings = ModelSettings(files=local_files(folder))
    images = mixed_images((90, 128), len(PROMPTS))
    results = {}
    for name, (preprocess, score) in published.items():
        reward = load_reward(name, RewardSettings(settings))
        expected = score(preprocess(images, sizes.image))
        ours = OURS[preprocess]
        got = score_images(reward, to_tensor(images), PROMPTS)
        results[name] = {
            "network": float((got - score(ours(to_tensor(images), sizes.image))).abs().max()),
            "whole": float((got - expected).abs().max()),
            "spread": float(expected.std()),
        }
    return results


def local_files(folder: Path) -> ModelFiles:
    """The repositories that `network_parity` wrote."""
    names = {OPENAI_CLIP: "openai", PICKSCORE: "pickscore", LAION_CLIP: "laion", AESTHETIC_HEAD: "head", HPSV2: "hps"}
    names |= {SIGLIP: "siglip", AESTHETIC_V2_5_HEAD: "aesthetic_predictor_v2_5.pth"}
    names |= {IMAGE_REWARD: "blip", BERT: "bert", DINO: "dino"}
    return ModelFiles({repo: str(folder / name) for repo, name in names.items()})


LARGE_ONES = {"unifiedreward": unified_parity, "videoreward": videoreward_parity, "detector": detector_parity}

# ViT-L/14 is 24 layers of 1024; half of its depth already shows how rounding adds up.
LARGE = Sizes(image=224, patch=14, depth=12, text_depth=12, vision_width=1024, text_width=768, projection=768)


def markdown(results: dict[str, Any]) -> str:
    """The table of `docs/rewards.md`: differences of scores on large networks, and of pixels at 224."""
    rows = [
        f"| `{name}` | {row['network']:.1g} | {row['whole']:.1g} | {row['spread']:.2g} |"
        for name, row in results["large"].items()
    ]
    pixels = [
        f"| {name} preprocessing | {row['largest']:.2g} | {row['mean']:.2g} |"
        for name, row in results["preprocessing"].items()
    ]
    head = ["| reward | same pixels | same images | spread of the scores |", "|---|---|---|---|"]
    pixel_head = ["| at 224 x 224, normalised pixels | largest difference | mean difference |", "|---|---|---|"]
    return "\n".join([*head, *rows, "", *pixel_head, *pixels])


def judge_table(results: dict[str, Any]) -> str:
    """The table of `docs/rewards.md` of vision-language models."""
    rows = [
        f"| `{name}` | {row['network']:.1g} | {row['whole']:.1g} | {row['spread']:.2g} |"
        for name, row in results["judges"].items()
    ]
    head = ["| tiny random model | unchanged images | resized images | spread of the scores |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def main() -> None:
    """Measures and writes."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {"preprocessing": preprocessing_parity()}
    for name, sizes in (("tiny", Sizes()), ("large", LARGE)):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = network_parity(Path(folder), sizes)
    with tempfile.TemporaryDirectory() as folder:
        results["judges"] = {f"vlm:{kind}": judge_parity(Path(folder) / kind, kind) for kind in KINDS}
        (Path(folder) / "hpsv3").mkdir()
        results["judges"]["hpsv3"] = hpsv3_parity(Path(folder) / "hpsv3")
        for name, parity in LARGE_ONES.items():
            (Path(folder) / name).mkdir()
            results["judges"][name] = parity(Path(folder) / name)
    print(f"{markdown(results)}\n\n{judge_table(results)}\n\n{write_results('reward_parity', results)}")


if __name__ == "__main__":
    main()
