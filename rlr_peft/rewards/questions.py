"""What a vision-language model is asked about an image, and what its answer is worth."""

from __future__ import annotations

from dataclasses import dataclass

from rlr_peft.config.reward import VLM_ANSWERS, VLM_QUESTION
from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata
from rlr_peft.rewards.scores import describe_samples

QUESTIONS = ("questions", "vqa_list", "question")  # in the metadata
ONE_WORD = " Answer in one word."
DIGITS = {
    word: str(number)
    for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), 1)
}


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


@dataclass(frozen=True)
class Question:
    """What is asked about an image.

    Attributes:
        text: as it is sent.
        right: the answer that is wanted.
        wrong: the one that it is held against; None for all others.
    """

    text: str
    right: str
    wrong: str | None


def questions_of(name: str, judge: JudgeSettings, prompts: list[str], metadata: Metadata) -> list[list[Question]]:
    """The questions about every sample, one or more: those of its metadata, else the template's.

    Args:
        name: of the reward, for errors.
        prompts: B texts.
        metadata: B dictionaries. `question` holds a text and `questions` a list, as a checklist does; so does
            `vqa_list`, as GenEval 2 calls it. An item is a text to which the good answer is right, or a pair of a text
            and its right answer, which may be any word.

    Raises:
        RewardError: metadata of another form.
    """
    asked = []
    for index, (prompt, entry) in enumerate(zip(prompts, metadata, strict=True)):
        given = next((entry[key] for key in QUESTIONS if key in entry), judge.question.replace("{prompt}", prompt))
        items = [given] if isinstance(given, str) else given
        questions = [_question(item, judge) for item in items] if isinstance(items, list) else []
        if not questions or None in questions:
            raise RewardError(
                f"reward '{name}': expected `{QUESTIONS[0]}` in the metadata to be a list of texts, or of pairs of a "
                f"text and its right answer, got {given!r:.100} for {describe_samples([index], prompts)}; correct the "
                "data, or leave the column out of --metadata_columns"
            )
        asked.append([question for question in questions if question is not None])
    return asked


def _question(item: object, judge: JudgeSettings) -> Question | None:
    good, bad = judge.answers
    match item:
        case str(text):
            return Question(text, good, bad)
        case [str(text), str(answer)] if answer.casefold() == bad.casefold():
            return Question(text + ONE_WORD, bad, good)
        case [str(text), str(answer)] if answer.strip():
            return Question(text + ONE_WORD, answer, bad if answer.casefold() == good.casefold() else None)
    return None


def spellings(answer: str) -> list[str]:
    """How a model may write an answer: small or capitalised, a number as a digit too, at once or after a space."""
    digit = [DIGITS[answer.lower()]] if answer.lower() in DIGITS else []
    forms = dict.fromkeys((answer, answer.lower(), answer.capitalize(), *digit))
    return [space + form for form in forms for space in ("", " ")]
