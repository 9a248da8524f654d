"""`ocr:MODEL`: the text of an image as a model of `transformers` reads it."""

from __future__ import annotations

from torch import Tensor

from rlr_peft.config.reward import OCR_PREFIX
from rlr_peft.rewards.base import Metadata
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, loading
from rlr_peft.rewards.ocr import asked_texts, compared, similarity
from rlr_peft.rewards.scores import Info
from rlr_peft.rewards.vlm import load_judge, shown_spec
from rlr_peft.rewards.vlm_inputs import read_inputs

MOST_TOKENS = 256
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
        network = load_judge(name, folder, settings)
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
        end = {"stop_strings": [END], "tokenizer": tokenizer} if END in tokenizer.get_vocab() else {}
        written = self.network.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False, **end)
        start = 0 if self.network.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return compared(self._similarity, asked, tokenizer.batch_decode(written[:, start:], skip_special_tokens=True))
