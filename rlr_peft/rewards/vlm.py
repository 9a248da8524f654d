"""A vision-language model of `transformers` as a judge: how much surer it is of yes than of no."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlr_peft.config.reward import VLM_PREFIX
from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, loading
from rlr_peft.rewards.questions import JudgeSettings, Question, questions_of, spellings


class VlmJudge(ModelReward):
    """log P(yes) - log P(no) of the next token, in nats, averaged over the questions about an image.

    Of a question with another right answer, the odds of that answer. All spellings of an answer that begin with a token
    of their own count, small or capitalised. Differentiable for the families of `vlm_inputs`, a black box for any
    other.

    Args:
        model: Hub id or local folder.
        judge: what is asked.
        settings: how the network is held. Weights are in bf16 where others would be in fp16, in which these networks
            overflow.

    Raises:
        RewardError: the model cannot be loaded or read, or its tokens do not tell the answers apart.
    """

    def __init__(self, model: str, judge: JudgeSettings, settings: ModelSettings) -> None:
        from rlr_peft.rewards.vlm_inputs import read_inputs

        place = Path(model).expanduser()
        name = f"{VLM_PREFIX}{place.resolve().name if place.is_dir() else model}"
        folder = settings.files.snapshot(name, model)
        network = load_judge(name, folder, settings)
        super().__init__(name, settings, network)
        with loading(name, folder):
            self._inputs = read_inputs(name, folder, network.config)
        self.differentiable = self._inputs.differentiable
        self._judge = judge
        good, bad = (self._begin(answer) for answer in judge.answers)
        self._common = good & bad
        self._tokens: dict[str, list[int]] = {}
        if not all(map(self._first_tokens, judge.answers)):
            raise RewardError(
                f"reward '{self.name}': expected answers that begin with different tokens, got "
                f"{' and '.join(map(repr, self._judge.answers))}; take other --vlm_answers"
            )

    def check_prompts(self, prompts: list[str], metadata: Metadata) -> None:
        """Refuses questions of another form."""
        questions_of(self.name, self._judge, prompts, metadata)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32, any real number."""
        asked = questions_of(self.name, self._judge, prompts, metadata)
        rows = torch.tensor([row for row, of_one in enumerate(asked) for _ in of_one], device=images.device)
        questions = [question for of_one in asked for question in of_one]
        inputs = self._inputs(images[rows], [question.text for question in questions])
        logits = self.network(**inputs, logits_to_keep=1).logits[:, -1].float()
        odds = torch.stack([self._odds(*pair) for pair in zip(logits, questions, strict=True)])
        counts = torch.tensor([len(of_one) for of_one in asked], device=images.device)
        return torch.zeros(len(prompts), device=images.device).index_add(0, rows, odds) / counts

    def _odds(self, logits: Tensor, question: Question) -> Tensor:
        right = self._first_tokens(question.right)
        others = torch.ones_like(logits, dtype=torch.bool)
        others[right] = False
        wrong = logits[others] if question.wrong is None else logits[self._first_tokens(question.wrong)]
        return logits[right].logsumexp(0) - wrong.logsumexp(0)

    def _first_tokens(self, answer: str) -> list[int]:
        """Of all spellings of an answer; what both answers begin with, such as a space, tells nothing."""
        if answer not in self._tokens:
            self._tokens[answer] = sorted(self._begin(answer) - self._begin(" ") - self._common)
        return self._tokens[answer]

    def _begin(self, answer: str) -> set[int]:
        return {self._inputs.tokenizer(text, add_special_tokens=False).input_ids[0] for text in spellings(answer)}


def load_judge(name: str, folder: Path, settings: ModelSettings) -> Any:
    """A network that answers questions about images, from a folder with its files.

    Raises:
        RewardError: it is none, or damaged.
    """
    from transformers import AutoModelForImageTextToText

    dtype = torch.bfloat16 if settings.dtype == torch.float16 else settings.dtype
    with loading(name, folder):
        return AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
