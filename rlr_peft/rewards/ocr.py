"""How well a text recogniser reads in the image what the prompt asks to be written there."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from rlr_peft.config.reward import OCR_PREFIX
from rlr_peft.errors import RewardError, extra
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, loading
from rlr_peft.rewards.preprocessing import to_8_bit
from rlr_peft.rewards.scores import Info, describe_samples
from rlr_peft.rewards.vlm import load_vlm, read_inputs, shown_spec, written_answers

TEXT = "text"  # in the metadata
# Straight, curly and pointed ones. Single ones count only at the edges of words: elsewhere they are apostrophes.
_QUOTED = re.compile(
    "\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|\u2018([^\u2019]+)\u2019|\u00ab([^\u00bb]+)\u00bb|(?<!\\w)'([^']+)'(?!\\w)"
)


class OcrReward(Reward):
    """1 - edit distance / length of the longer text, in [0, 1], between what is asked and what is read.

    Letters count whatever their case, spaces do not. All text in the image counts, so that what nobody asked for costs.
    The recogniser is PP-OCRv6 (small) in the package rapidocr, which brings its weights; it runs on the CPU.

    Raises:
        UserError: rapidocr or rapidfuzz is not installed.
    """

    name = "ocr"
    overlaps = True

    def __init__(self) -> None:
        rapidocr = extra("rapidocr", "ocr", "--reward_fn ocr")
        self._similarity = similarity()
        # As many threads as torch has: left to itself it takes every core, whose idle threads wait in a loop.
        engine = {"intra_op_num_threads": torch.get_num_threads(), "inter_op_num_threads": 1}
        params = {f"EngineConfig.onnxruntime.{name}": value for name, value in engine.items()}
        self._recognizer: Any = rapidocr.RapidOCR(params={"Global.log_level": "critical", **params})

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """Score a batch.

        Args:
            images: (B, 3, H, W) in [0, 1]; rounded to 8 bits.
            prompts: B prompts, of which the quoted parts are asked for.
            metadata: `text`, if it is there, is asked for instead.

        Returns:
            (B,) float32 on the CPU, and as info `exact`: 1 where nothing but what is asked is read, else 0.
        """
        asked = asked_texts(self.name, prompts, metadata)
        scores, info = compared(self._similarity, asked, [self._read(pixels) for pixels in to_8_bit(images)])
        return Scored(scores, info=info)

    def check_prompts(self, prompts: list[str], metadata: Metadata) -> None:
        """Refuses those that ask for no text."""
        asked_texts(self.name, prompts, metadata)

    def _read(self, pixels: Any) -> str:
        """All text of an image (H, W, 3) uint8, from top to bottom."""
        found = self._recognizer(pixels[..., ::-1].copy())  # it wants blue first
        return "".join(found.txts or ())


def similarity() -> Any:
    """1 - Levenshtein's distance / length of the longer of two texts.

    Raises:
        UserError: rapidfuzz is not installed.
    """
    return extra("rapidfuzz.distance", "ocr", "--reward_fn ocr").Levenshtein.normalized_similarity


def asked_texts(name: str, prompts: list[str], metadata: Metadata) -> list[str]:
    """What each image should say, in the form of `plain`.

    Args:
        name: of the reward, for errors.

    Raises:
        RewardError: a prompt asks for no text.
    """
    texts = [
        plain(str(entry.get(TEXT) or " ".join(map("".join, _QUOTED.findall(prompt)))))
        for prompt, entry in zip(prompts, metadata, strict=True)
    ]
    missing = [index for index, text in enumerate(texts) if not text]
    if missing:
        raise RewardError(
            f"reward '{name}': expected the text to be written in quotes (\"OPEN\"), or as `{TEXT}` in the metadata "
            f"(--metadata_columns {TEXT}), got neither for {describe_samples(missing, prompts)}"
        )
    return texts


def compared(like: Any, asked: list[str], read: list[str]) -> tuple[Tensor, Info]:
    """(B,) float32 on the CPU of how much what was read is like what was asked for, and where it is the same."""
    found = [plain(text) for text in read]
    scores = [like(a, b) for a, b in zip(asked, found, strict=True)]
    exact = torch.tensor([float(a == b) for a, b in zip(asked, found, strict=True)])
    return torch.tensor(scores, dtype=torch.float32), {"exact": exact}


def plain(text: str) -> str:
    """Without spaces and case, which tell little of how well a text is drawn."""
    return "".join(text.casefold().split())


QUESTIONS = {"glm_ocr": "Text Recognition:"}  # by the model's type, as its authors ask it
QUESTION = "OCR:"
END = "<|im_end|>"  # of a turn; GOT-OCR 2 does not name it in its own settings


class OcrModel(ModelReward):
    """As `OcrReward`, of what a model of `transformers` writes down; without gradient.

    Args:
        model: Hub id or folder. It is asked by its chat template, as PaddleOCR-VL, or not at all, as GOT-OCR 2, and
            TrOCR, which reads a single line.

    Raises:
        RewardError: the model cannot be loaded or read.
        UserError: rapidfuzz is not installed.
    """

    def __init__(self, model: str, settings: ModelSettings) -> None:
        self._similarity = similarity()
        name = shown_spec(OCR_PREFIX, model)
        folder = settings.files.snapshot(name, model)
        network = load_vlm(name, folder, settings)
        super().__init__(name, settings, network)
        self.differentiable = False
        with loading(name, folder):
            self._inputs = read_inputs(name, folder, network.config, only_reads=True)
        self._question = QUESTIONS.get(network.config.model_type, QUESTION)

    def check_prompts(self, prompts: list[str], metadata: Metadata) -> None:
        """Refuses those that ask for no text."""
        asked_texts(self.name, prompts, metadata)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> tuple[Tensor, Info]:
        """(B,) float32 in [0, 1], and as info `exact`."""
        asked = asked_texts(self.name, prompts, metadata)
        inputs = self._inputs(images, [self._question] * len(images))
        tokenizer = self._inputs.tokenizer
        stop = END if END in tokenizer.get_vocab() else None
        return compared(self._similarity, asked, written_answers(self.network, inputs, tokenizer, stop))
