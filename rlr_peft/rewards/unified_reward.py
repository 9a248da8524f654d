"""UnifiedReward 2.0 (Wang et al., 2025): a vision-language model that writes three scores."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.model_files import UNIFIED_QUESTION, ModelFiles
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, loading
from rlr_peft.rewards.published_texts import template_in
from rlr_peft.rewards.remote import RemoteSettings
from rlr_peft.rewards.scores import describe_samples
from rlr_peft.rewards.vlm_endpoint import Endpoint

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
        from rlr_peft.rewards.vlm import load_judge
        from rlr_peft.rewards.vlm_inputs import read_inputs

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
