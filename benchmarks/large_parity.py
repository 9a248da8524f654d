"""How far the rewards that see objects, write answers or look at videos are from the published way."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil

from benchmarks.reward_checkpoints import Sizes, write_clip, write_owl
from benchmarks.vlm_checkpoints import write_videoreward, write_vlm
from benchmarks.vlm_parity import published_inputs, published_processor
from rlr_peft.rewards import ModelFiles, ModelSettings, RewardSettings, load_reward, score_images
from rlr_peft.rewards.detector import COLOR_TEXTS, COLORS
from rlr_peft.rewards.model_files import (
    OPENAI_CLIP,
    OWLV2,
    QWEN2_VL_2B,
    UNIFIED_REWARD,
    UNIFIED_REWARD_CODE,
    VIDEO_REWARD,
    VIDEO_REWARD_CODE,
)
from rlr_peft.rewards.video_rewards import SCORES

LABELS = ["cat", "dog"]


def load(name: str, places: dict[str, Path]) -> Any:
    """The reward from these files."""
    files = ModelFiles({repo: str(place) for repo, place in places.items()})
    return load_reward(name, RewardSettings(ModelSettings(files=files)))


@torch.no_grad()
def detector_parity(folder: Path) -> dict[str, float]:
    """Largest difference of the objects' places in pixels (`network`) and of the colours' cosines on a box (`whole`).

    Both sides see the same 8-bit images. The other one is `Owlv2Processor` with its model, and `CLIPImageProcessor`
    with `CLIPModel` on what PIL cuts out.
    """
    from benchmarks.reward_parity import mixed_images, to_tensor

    torch.manual_seed(0)
    write_clip(folder / "clip", Sizes())
    write_owl(folder / "owl")
    reward = load("detector", {OWLV2: folder / "owl", OPENAI_CLIP: folder / "clip"})
    places, cosines, spread = [], [], []
    for picture in mixed_images((60, 90), 4):
        image = to_tensor([picture])[0]
        inputs = reward._processor(
            text=[[f"a photo of a {label}" for label in LABELS]], images=picture, return_tensors="pt"
        )
        (published,) = reward._processor.post_process_grounded_object_detection(
            reward.network["detector"](**inputs), threshold=0.2, target_sizes=[(60, 90)], text_labels=[LABELS]
        )
        known = {tuple(box) for box in published["boxes"].tolist()}
        boxes = [box for found in reward.find(image, LABELS).values() for box in found]
        places += [min(max(abs(a - b) for a, b in zip(box, other)) for other in known) for box in boxes]
        expected = published_colors(reward, picture.crop((20, 10, 70, 50)), "cat")
        got = reward.color_cosines(image, "cat", (20.0, 10.0, 70.0, 50.0))
        cosines.append(float((got - expected).abs().max()))
        spread.append(expected)
    return {"network": max(places), "whole": max(cosines), "spread": float(torch.stack(spread).std())}


def published_colors(reward: Any, part: Image.Image, name: str) -> Tensor:
    """Cosines (colours,) of a picture and the mean directions of what is said of a colour."""
    clip = reward.network["colors"]
    side = clip.config.vision_config.image_size
    process = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    seen = clip.get_image_features(**process(images=part, return_tensors="pt")).pooler_output
    directions = []
    for color in COLORS:
        texts = [text.format(color=color, name=name) for text in COLOR_TEXTS]
        read = clip.get_text_features(**reward._tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        directions.append(F.normalize(read).mean(0))
    return F.normalize(torch.stack(directions)) @ F.normalize(seen)[0]


@torch.no_grad()
def unified_parity(folder: Path) -> dict[str, float]:
    """Differences of the log-probabilities of the first word that is written, as greedy words alone would hide them."""
    from benchmarks.reward_parity import PROMPTS, mixed_images, to_tensor

    torch.manual_seed(0)
    write_vlm(folder / "model", "qwen2_5_vl")
    (folder / "script.py").write_text("problem = (f'Look and rate it.\\nCaption: [{prompt}]')\n")
    reward = load("unifiedreward", {UNIFIED_REWARD_CODE: folder / "script.py", UNIFIED_REWARD: folder / "model"})
    processor = published_processor(folder / "model", "qwen2_5_vl")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    results = {}
    for name, shape in (("network", (32, 32)), ("whole", (70, 90))):
        images = mixed_images(shape, len(PROMPTS))
        questions = [f"Look and rate it.\nCaption: [{prompt}]" for prompt in PROMPTS]
        expected = model(**published_inputs(processor, images, questions)).logits[:, -1].log_softmax(-1)
        inputs = reward._inputs(to_tensor(images), [reward._question.replace("{prompt}", prompt) for prompt in PROMPTS])
        got = reward.network(**inputs).logits[:, -1].log_softmax(-1)
        results[name] = float((got - expected).abs().max())
        results["spread"] = float(expected.std())
    return results


@torch.no_grad()
def videoreward_parity(folder: Path) -> dict[str, float]:
    """One video after the other, without padding and with LoRA that is not merged, in the published forward pass.

    Two frames become one patch: the published processor makes patches of images, of which it repeats each.
    """
    from benchmarks.reward_parity import PROMPTS, mixed_images, to_tensor

    torch.manual_seed(0)
    wrapped = write_videoreward(folder / "qwen", folder / "published", folder / "code.py")
    places = {QWEN2_VL_2B: folder / "qwen", VIDEO_REWARD: folder / "published", VIDEO_REWARD_CODE: folder / "code.py"}
    reward, model = load("videoreward", places), wrapped.base_model.model
    processor = published_processor(folder / "qwen", "qwen2_vl").image_processor
    processor.size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 200_704}
    tokenizer = reward._inputs.tokenizer
    results = {}
    # The first size is kept as it is.
    for name, shape in (("network", (448, 448)), ("whole", (70, 90))):
        videos = [mixed_images(shape, 9, seed=number) for number in range(len(PROMPTS))]
        expected = []
        for video, prompt in zip(videos, PROMPTS, strict=True):
            stills = [
                processor(images=video[place], return_tensors="pt") for place in (0, 3, 5, 8)
            ]  # of 9 at 8 a second
            patches = [still["pixel_values"].unflatten(1, (3, 2, 14, 14)) for still in stills]
            pairs = [torch.stack([a[:, :, 0], b[:, :, 1]], 2).flatten(1) for a, b in zip(patches[::2], patches[1::2])]
            grid = torch.as_tensor(stills[0]["image_grid_thw"]) * torch.tensor([2, 1, 1])
            seen = model.model.get_video_features(torch.cat(pairs), grid).pooler_output[0]
            question = reward._question.format(text_prompt=prompt)
            message = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            text = text.replace("<|video_pad|>", "<|video_pad|>" * len(seen))
            ids = tokenizer(text, return_tensors="pt").input_ids
            embeddings = model.model.language_model.embed_tokens(ids)
            embeddings[ids == model.config.video_token_id] = seen
            states = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
            tokens = tokenizer.convert_tokens_to_ids([f"<|{key}_reward|>" for key in SCORES.values()])
            raw = [float(model.rm_head(states[ids == token])) for token in tokens]
            expected.append((raw[0] - 3.5) / 2 + (raw[1] - 1) / 1.5 + (raw[2] - 3) / 2.5)
        got = score_images(reward, torch.stack([to_tensor(video) for video in videos]), PROMPTS)
        results[name] = float((got - torch.tensor(expected)).abs().max())
        results["spread"] = float(torch.tensor(expected).std())
    return results
