"""ImageReward (Xu et al., 2023): human preference from BLIP's joint reading of image and prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertTokenizer

from rlr_peft.rewards.image_reward_weights import image_reward_network
from rlr_peft.rewards.model_files import load_weights
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, loading
from rlr_peft.rewards.preprocessing import clip_pixels

IMAGE_REWARD = "zai-org/ImageReward"
IMAGE_REWARD_FILES = ("ImageReward.safetensors", "ImageReward.pt")
BERT = "google-bert/bert-base-uncased"
MAX_LENGTH = 35  # tokens; longer prompts are cut off, as in training
# Mean and standard deviation of the raw score over the authors' data.
MEAN, STD = 0.16717183, 1.03334


class ImageReward(ModelReward):
    """The score is standardised: 0 is an average image for its prompt. The head is kept in float32."""

    def __init__(self, settings: ModelSettings) -> None:
        path = settings.files.find("imagereward", IMAGE_REWARD, *IMAGE_REWARD_FILES)
        network = image_reward_network("imagereward", path, load_weights("imagereward", path), settings.dtype)
        super().__init__("imagereward", settings, network)
        folder = settings.files.folder("imagereward", BERT, "vocab.txt")
        with loading("imagereward", folder):
            self._tokenizer = BertTokenizer.from_pretrained(folder, do_lower_case=True)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32, about -2 to 2."""
        vision, text, head = (self.network[name] for name in ("vision", "text", "head"))
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(images.device)
        pixels = clip_pixels(images, vision.config.image_size).to(vision.dtype)
        patches = vision(pixel_values=pixels).last_hidden_state
        read = text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
        ).last_hidden_state
        raw: Tensor = head(read[:, 0].float())
        return (raw - MEAN) / STD
