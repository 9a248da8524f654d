"""Rewards of whole videos: how steady the picture is, whether the subject stays the same, and VideoReward.

VideoReward (Liu et al., 2025) is quality, motion and alignment of a video, as a Qwen2-VL-2B reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, ViTModel

from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.model_files import constant_in
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, load_weights, loading, unit
from rlr_peft.rewards.preference_rewards import qwen2_vl_network, read_as_plain_text
from rlr_peft.rewards.preprocessing import vbench_pixels
from rlr_peft.rewards.vlm import QwenVideoInputs


class TemporalFlicker(Reward):
    """One minus the mean absolute difference of neighbouring frames, in [0, 1]: VBench's temporal flickering.

    A still image scores 1, so that it should be held against a reward that asks for motion.
    """

    name = "temporal-flicker"
    differentiable = True
    takes_video = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """Of videos (B, F, 3, H, W), F >= 2; prompts and metadata are not looked at."""
        _check_length(self.name, images)
        videos = images.float()
        return Scored(1 - (videos[:, 1:] - videos[:, :-1]).abs().mean((1, 2, 3, 4)))


class SubjectConsistency(ModelReward):
    """Mean over the later frames of their DINO feature's cosine to the first and to the previous frame: VBench's.

    Negative cosines count as 0, as there.
    """

    takes_video = True

    def __init__(self, settings: ModelSettings) -> None:
        (folder,) = settings.files.of("subject-consistency")
        with loading("subject-consistency", folder):
            network = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=settings.dtype)
        super().__init__("subject-consistency", settings, network)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32 in [0, 1] of videos (B, F, 3, H, W), F >= 2; prompts are not looked at."""
        _check_length(self.name, images)
        # What is left of a side beyond whole patches is cut off by the network itself, as in the original.
        pixels = vbench_pixels(images.flatten(0, 1), self.network.config.image_size).to(self.network.dtype)
        tokens = self.network(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        features = unit(tokens[:, 0]).unflatten(0, images.shape[:2])
        to_first = (features[:, 1:] * features[:, :1]).sum(-1)
        to_previous = (features[:, 1:] * features[:, :-1]).sum(-1)
        return ((to_first.clamp(min=0) + to_previous.clamp(min=0)) / 2).mean(1)


def _check_length(name: str, videos: Tensor) -> None:
    """Raises RewardError for videos (B, F, 3, H, W) of a single frame."""
    if videos.shape[1] < 2:
        raise RewardError(f"reward '{name}': expected videos of 2 frames or more, got {videos.shape[1]}")


NAME = "videoreward"
SCORES = {"visual_quality": "VQ", "motion_quality": "MQ", "text_alignment": "TA"}
LEAST_PIXELS = 128 * 28 * 28  # of every frame, whatever its shape
CHECKPOINT = "checkpoint-11352/model.pth"
FEWEST_FRAMES, MOST_FRAMES = 4, 768
# What stands before every name in the checkpoint, and within those of layers with LoRA.
WRAPPER, BASE, DOWN, UP = "base_model.model.", ".base_layer", ".lora_A.default.weight", ".lora_B.default.weight"


class VideoReward(ModelReward):
    """The sum of three scores, for visual quality, motion and alignment, each in standard deviations of its authors'.

    It looks at two frames a second of the video (as its `model_config.json` says), four or more, by the frame rate of
    the chain. LoRA is merged, the head kept in float32, and the rest in bf16 where others would be in fp16.
    """

    takes_video = True

    def __init__(self, settings: ModelSettings) -> None:
        folder, published, code = settings.files.of(NAME)
        self._question = constant_in(NAME, code, "DETAILED_PROMPT_WITH_SPECIAL_TOKEN")
        read = read_published_config(published / "model_config.json")
        self._rate, self._fps = float(read["data_config"]["fps"]), settings.fps
        norms = read["inference_config"]
        self._norms = [(float(norms[f"{key}_mean"]), float(norms[f"{key}_std"])) for key in SCORES.values()]
        size = {"shortest_edge": LEAST_PIXELS, "longest_edge": int(read["data_config"]["max_frame_pixels"])}
        with loading(NAME, folder):
            config = AutoConfig.from_pretrained(folder)
            self._inputs = QwenVideoInputs(NAME, folder, config, size=size)
        tokens = [f"<|{key}_reward|>" for key in SCORES.values()]
        self._inputs.tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        self._tokens = self._inputs.tokenizer.convert_tokens_to_ids(tokens)
        path = published / CHECKPOINT
        weights = merged(load_weights(NAME, path), read["peft_lora_config"])
        head = nn.Linear(config.text_config.hidden_size, len(weights.get("rm_head.weight", [0])), bias=False)
        super().__init__(NAME, settings, qwen2_vl_network(NAME, path, weights, config, head, settings.dtype))

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) float32 of videos (B, F, 3, H, W), F >= 2, about -9 to 9; and its three parts."""
        frames = frames_seen(images.shape[1], self._fps, self._rate)
        inputs = self._inputs(images[:, frames], [self._question.format(text_prompt=prompt) for prompt in prompts])
        model, ids = self.network["model"], inputs["input_ids"]
        seen = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
        states = read_as_plain_text(model, inputs, seen, model.config.video_token_id)
        rows, columns = [], torch.arange(ids.shape[1], device=ids.device)
        for number, token in enumerate(self._tokens):
            # The prompt may name the tokens too: it stands behind the question's first two and before its last.
            places = torch.where(ids == token, columns, -1 if number == 2 else len(columns))
            place = places.amax(1) if number == 2 else places.amin(1)
            out = self.network["head"](states[torch.arange(len(ids)), place].float())
            rows.append(out[:, number if out.shape[1] > 1 else 0])
        parts = [(row - mean) / std for row, (mean, std) in zip(rows, self._norms, strict=True)]
        return torch.stack(parts).sum(0), {name: part.detach() for name, part in zip(SCORES, parts, strict=True)}


def frames_seen(total: int, fps: float, rate: float) -> list[int]:
    """Which frames of a video are looked at: evenly spread, an even number, so many a second.

    Args:
        rate: frames a second that are looked at.

    Raises:
        RewardError: fewer than two frames.
    """
    if total < 2:
        raise RewardError(f"reward '{NAME}': expected videos of 2 frames or more, got {total}")
    most = min(MOST_FRAMES, total) // 2 * 2
    count = 2 * round(min(max(total / fps * rate, FEWEST_FRAMES), most) / 2)
    places: list[int] = torch.linspace(0, total - 1, min(count, total)).round().long().tolist()
    return places


def read_published_config(path: Path) -> dict[str, Any]:
    """What the model was trained with.

    Raises:
        RewardError: another file.
    """
    needed = {
        "data_config": ("fps", "max_frame_pixels"),
        "peft_lora_config": ("lora_alpha",),
        "inference_config": tuple(f"{key}_{part}" for key in SCORES.values() for part in ("mean", "std")),
    }
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        missing = [f"{group}.{name}" for group, names in needed.items() for name in names if name not in read[group]]
    except (ValueError, KeyError, TypeError) as error:
        missing = [f"{type(error).__name__}: {error}"]
    if missing:
        raise RewardError(
            f"reward '{NAME}': expected {', '.join(needed)} of the published model in {path}, which lacks "
            f"{', '.join(missing):.200}; it is another file: get it again"
        )
    return dict(read)


def merged(checkpoint: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights under the names of the model alone, with what LoRA adds to them."""
    weights = {name.removeprefix(WRAPPER): value for name, value in checkpoint.items()}
    for name in [name.removesuffix(DOWN) for name in weights if name.endswith(DOWN)]:
        down, up = (weights.pop(name + ending).float() for ending in (DOWN, UP))
        rank = len(down)
        scale = float(lora["lora_alpha"]) / (math.sqrt(rank) if lora.get("use_rslora") else rank)
        base = weights[f"{name}{BASE}.weight"]
        weights[f"{name}{BASE}.weight"] = (base.float() + scale * up @ down).to(base.dtype)
    return {name.replace(BASE, ""): value for name, value in weights.items()}
