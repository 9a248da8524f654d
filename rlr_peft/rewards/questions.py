"""What a vision-language model is asked about an image, and what its answer is worth."""

from __future__ import annotations

from dataclasses import dataclass

from rlr_peft.config.reward import VLM_ANSWERS, VLM_QUESTION
from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata
from rlr_peft.rewards.scores import describe_samples

VLM_PREFIX = "vlm:"
ONE_QUESTION, CHECKLIST = "question", "questions"


@dataclass(frozen=True)
class JudgeSettings:
    """How `vlm:MODEL` asks.

    Attributes:
        question: a template, with `{prompt}` in the place of the prompt.
        answers: the good one and the bad one.
        endpoint: OpenAI-compatible URL, up to and without `/chat/completions`, behind which the model is; None loads it
            here.
    """

    question: str = VLM_QUESTION
    answers: tuple[str, ...] = VLM_ANSWERS
    endpoint: str | None = None


def questions_of(name: str, template: str, prompts: list[str], metadata: Metadata) -> list[list[str]]:
    """The questions about every sample, one or more: those of its metadata, else the template's.

    Args:
        name: of the reward, for errors.
        template: as in `JudgeSettings`.
        prompts: B texts.
        metadata: B dictionaries; `question` holds a text and `questions` a list of texts, as a checklist does, to which
            the good answer is right.

    Raises:
        RewardError: metadata of another form.
    """
    asked = []
    for index, (prompt, entry) in enumerate(zip(prompts, metadata, strict=True)):
        given = entry.get(CHECKLIST, entry.get(ONE_QUESTION, template.replace("{prompt}", prompt)))
        questions = [given] if isinstance(given, str) else given
        if not isinstance(questions, list) or not questions or not all(isinstance(one, str) for one in questions):
            raise RewardError(
                f"reward '{name}': expected `{CHECKLIST}` to be a list of texts, or `{ONE_QUESTION}` to be a text, got "
                f"{given!r:.100} for {describe_samples([index], prompts)}; correct the data, or leave the column out "
                "of --metadata_columns"
            )
        asked.append(questions)
    return asked


def spellings(answer: str) -> list[str]:
    """How a model may write an answer: small or capitalised, at once or after a space."""
    forms = dict.fromkeys((answer, answer.lower(), answer.capitalize()))
    return [space + form for form in forms for space in ("", " ")]
