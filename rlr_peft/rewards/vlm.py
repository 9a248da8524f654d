"""Vision-language models of `transformers` as judges: how much surer one is of yes than of no, or the scores it writes.

UnifiedReward 2.0 (Wang et al., 2025) writes three.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from rlr_peft.config.reward import VLM_PREFIX
from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.model_files import UNIFIED_QUESTION, ModelFiles, template_in
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, loading
from rlr_peft.rewards.questions import JudgeSettings, Question, questions_of, spellings
from rlr_peft.rewards.remote import RemoteSettings
from rlr_peft.rewards.scores import describe_samples
from rlr_peft.rewards.vlm_endpoint import Endpoint
from rlr_peft.rewards.vlm_inputs import read_inputs


class VlmJudge(ModelReward):
    """log P(yes) - log P(no) of the next token, in nats, averaged over the questions about an image.

    Of a question with another right answer, the odds of that answer. All spellings of an answer that begin with a token
    of their own count, small or capitalised. Differentiable for the families of `vlm_inputs`, a black box for any
    other.

    Args:
        settings: how the network is held. Weights are in bf16 where others would be in fp16, in which these networks
            overflow.

    Raises:
        RewardError: the model cannot be loaded or read, or its tokens do not tell the answers apart.
    """

    def __init__(self, model: str, judge: JudgeSettings, settings: ModelSettings) -> None:
        name = shown_spec(VLM_PREFIX, model)
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


def shown_spec(prefix: str, model: str) -> str:
    """The reward's name: of a model in a folder without the path to it."""
    place = Path(model).expanduser()
    return f"{prefix}{place.resolve().name if place.is_dir() else model}"


def load_judge(name: str, folder: Path, settings: ModelSettings) -> Any:
    """A network that answers questions about images, from a folder with its files.

    Raises:
        RewardError: it is none, or damaged.
    """
    dtype = torch.bfloat16 if settings.dtype == torch.float16 else settings.dtype
    with loading(name, folder):
        return AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )


NAME = "unifiedreward"
SERVED_NAME = "UnifiedReward"  # as its authors' server calls it
MOST_TOKENS = 256
_SCORE = re.compile(r"(Alignment|Coherence|Style) Score \(1-5\):\s*(-?\d+(?:\.\d+)?)")


class UnifiedReward(ModelReward):
    """The mean of the scores for alignment, coherence and style; greedy, without gradient.

    Raises:
        RewardError: files are missing.
    """

    def __init__(self, settings: ModelSettings) -> None:
        script, folder = settings.files.of(NAME)
        self._question = published_question(script)
        network = load_judge(NAME, folder, settings)
        super().__init__(NAME, settings, network)
        self.differentiable = False
        with loading(NAME, folder):
            self._inputs = read_inputs(NAME, folder, network.config)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) float32 from 1 to 5, and the three scores."""
        inputs = self._inputs(images, [self._question.replace("{prompt}", prompt) for prompt in prompts])
        written = self.network.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
        length = inputs["input_ids"].shape[1]
        answers = self._inputs.tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        return read_scores(answers, prompts)


class UnifiedRewardEndpoint(Reward):
    """The same of a model behind an OpenAI-compatible URL, which knows it as `UnifiedReward`."""

    name = NAME
    overlaps = True

    def __init__(self, url: str, files: ModelFiles, settings: RemoteSettings) -> None:
        self._question = published_question(files.place(NAME, UNIFIED_QUESTION))
        self._endpoint = Endpoint(NAME, url, SERVED_NAME, settings)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """Metadata are not looked at."""
        questions = [self._question.replace("{prompt}", prompt) for prompt in prompts]
        choices = self._endpoint.ask(images, questions, max_tokens=MOST_TOKENS)
        scores, info = read_scores([str(choice["message"]["content"]) for choice in choices], prompts)
        return Scored(scores, info=info)


def published_question(script: Path) -> str:
    """With `{prompt}` in the place of the prompt, out of the authors' own script."""
    return template_in(NAME, script, "prompt")


def read_scores(answers: list[str], prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) means of three scores from 1 to 5, and each of them.

    Raises:
        RewardError: an answer does not hold each of them once, or one is out of range: it is never taken for a number.
    """
    rows = []
    for index, answer in enumerate(answers):
        found = [(name.lower(), float(value)) for name, value in _SCORE.findall(answer)]
        scores = dict(found)
        if len(found) != 3 or len(scores) != 3 or not all(1 <= value <= 5 for value in scores.values()):
            raise RewardError(
                f"reward '{NAME}': expected the scores for alignment, coherence and style, from 1 to 5 and once each, "
                f"got the answer {answer!r:.400} for {describe_samples([index], prompts)}"
            )
        rows.append(scores)
    info = {name: torch.tensor([row[name] for row in rows]) for name in ("alignment", "coherence", "style")}
    return torch.stack(list(info.values())).mean(0), info
