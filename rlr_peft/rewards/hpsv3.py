"""HPSv3 (Ma et al., 2025): human preference, as a Qwen2-VL-7B with a head reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Qwen2VLModel

from rlr_peft.rewards.base import Metadata
from rlr_peft.rewards.model_files import constant_in
from rlr_peft.rewards.model_reward import (
    ModelReward,
    ModelSettings,
    check_keys,
    load_weights,
    loading,
)
from rlr_peft.rewards.vlm_inputs import QwenInputs

REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28  # of every image, whatever its shape
# The published names of the modules, and those of `Qwen2VLModel`.
_PREFIXES = {"model.": "language_model."}


class HPSv3(ModelReward):
    """The mean of the preference that the head predicts; its second output, the spread, is left alone.

    The head is kept in float32, and the rest in bf16 where others would be in fp16. The question that the model was
    trained with is read out of its authors' file.
    """

    def __init__(self, settings: ModelSettings) -> None:
        name = "hpsv3"
        folder, path, code = settings.files.of(name)
        self._question = constant_in(name, code, "INSTRUCTION")
        self._ending = constant_in(name, code, "prompt_with_special_token")
        with loading(name, folder):
            config = AutoConfig.from_pretrained(folder)
            size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
            self._inputs = QwenInputs(name, folder, config, size=size)
        self._inputs.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        self._reward_token = self._inputs.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        weights, head = load_weights(name, path), _head(config.text_config.hidden_size)
        super().__init__(name, settings, qwen2_vl_network(name, path, weights, config, head, settings.dtype))

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32, about -5 to 15."""
        questions = [self._question.format(text_prompt=prompt) + self._ending for prompt in prompts]
        inputs = self._inputs(images, questions)
        model, ids = self.network["model"], inputs["input_ids"]
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        states = read_as_plain_text(model, inputs, seen, model.config.image_token_id)
        # The prompt may name the token too: the question's own is the last one.
        last = ids.shape[1] - 1 - (ids == self._reward_token).flip(1).int().argmax(1)
        scores: Tensor = self.network["head"](states[torch.arange(len(ids)), last].float())[:, 0]
        return scores


def read_as_plain_text(model: Any, inputs: Mapping[str, Tensor], seen: Sequence[Tensor], token: int) -> Tensor:
    """The last states (B, L, D) of a Qwen2-VL that was trained without the places of rows, columns and frames.

    Args:
        model: the `Qwen2VLModel`.
        inputs: `input_ids` and `attention_mask` (B, L).
        seen: features of each sample's image or video.
        token: what stands in the text for one of them.
    """
    ids = inputs["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    is_seen = (ids == token)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(is_seen, torch.cat(list(seen)).to(embeddings))
    places = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
    states: Tensor = model.language_model(
        inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], position_ids=places
    ).last_hidden_state
    return states


def qwen2_vl_network(
    reward_name: str, path: Path, checkpoint: Mapping[str, Tensor], config: Any, head: nn.Module, dtype: torch.dtype
) -> nn.ModuleDict:
    """`model` and `head`, filled.

    Args:
        reward_name: for errors.
        path: of the checkpoint, for errors.
        checkpoint: weights under the names of older `transformers`; those of the head begin with `rm_head`.
        config: of the Qwen2-VL.
        head: kept in float32.
        dtype: of the rest; bf16 in place of fp16.

    Raises:
        RewardError: weights are missing or unknown.
    """
    weights: dict[str, Tensor] = {}
    for name, value in checkpoint.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        weights[_PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = value
    weights.pop("lm_head.weight", None)  # it writes no word
    head_weights = {name: weights.pop(name).float() for name in list(weights) if name.startswith("rm_head.")}
    config.text_config.vocab_size = len(weights["language_model.embed_tokens.weight"])
    heads = nn.ModuleDict({"rm_head": head})
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    with loading(reward_name, path):
        model, info = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
        loaded = heads.load_state_dict(head_weights, strict=False)
    missing = [*info["missing_keys"], *loaded.missing_keys]
    check_keys(reward_name, path, missing, [*info["unexpected_keys"], *loaded.unexpected_keys])
    return nn.ModuleDict({"model": model, "head": head})


def _head(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
