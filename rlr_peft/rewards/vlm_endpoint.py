"""What a vision-language model is asked about an image, what its answer is worth, and a judge behind an endpoint.

An OpenAI-compatible endpoint answers with log-probabilities.
"""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import logsumexp
from torch import Tensor

from rlr_peft.config.reward import VLM_ANSWERS, VLM_PREFIX, VLM_QUESTION
from rlr_peft.errors import RewardError
from rlr_peft.json_server import JsonServer, read_address
from rlr_peft.redaction import redacted_address
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.preprocessing import to_8_bit
from rlr_peft.rewards.remote import RemoteSettings, encode_png, explaining
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


TOP_LOGPROBS = 20  # as many as the API gives
LEAST = 1e-6  # probability of all other answers


class Endpoint:
    """Asks about images, several questions at once.

    Args:
        name: of the reward, for errors.
        url: up to and without ``/chat/completions``. The key is read from the environment variable OPENAI_API_KEY.
        model: the name that the server knows it by.
        settings: how to ask; as many questions at once as `batch_size`.

    Raises:
        RewardError: no URL.
    """

    def __init__(self, name: str, url: str, model: str, settings: RemoteSettings) -> None:
        try:
            parts = read_address(url)
        except ValueError as error:
            raise RewardError(f"reward '{name}': --vlm_endpoint '{redacted_address(url)}': {error}") from None
        # A query, such as the version of the API that some servers ask for, stays at the end.
        self._url = parts._replace(path=f"{parts.path.rstrip('/')}/chat/completions").geturl()
        self._name, self._model, self._settings = name, model, settings
        self._connections = threading.local()  # one asks one question at a time

    def ask(self, images: Tensor, questions: list[str], **options: Any) -> list[dict[str, Any]]:
        """The first choice of every answer.

        Args:
            images: (B, 3, H, W) in [0, 1]; rounded to 8 bits.
            questions: B texts.

        Raises:
            RewardError: the server cannot be reached, refuses, or answers in another form.
        """
        pictures = [encode_png(pixels) for pixels in to_8_bit(images)]
        with ThreadPoolExecutor(min(self._settings.batch_size, len(questions))) as pool:
            return list(pool.map(lambda picture, question: self._ask(picture, question, options), pictures, questions))

    def _ask(self, picture: str, question: str, options: dict[str, Any]) -> dict[str, Any]:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        message = {"role": "user", "content": [image, {"type": "text", "text": question}]}
        body = {"model": self._model, "messages": [message], "temperature": 0, **options}
        server = self._server()
        where = f"reward '{self._name}': the endpoint {server.name}"
        with explaining(where):
            answer = server.ask(body)
        try:
            choice: dict[str, Any] = answer["choices"][0]
            choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise RewardError(f"{where}: expected an OpenAI chat completion, got {server.shown(answer)}") from None
        return choice

    def _server(self) -> JsonServer:
        if not hasattr(self._connections, "server"):
            key, settings = os.environ.get("OPENAI_API_KEY"), self._settings
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            self._connections.server = JsonServer(
                self._url, settings.timeout, settings.retries, settings.backoff, headers
            )
        server: JsonServer = self._connections.server
        return server


class VlmEndpoint(Reward):
    """log P(yes) - log P(no), in nats, averaged over the questions about an image, among the 20 likeliest first tokens.

    An answer that is not among them counts as the least likely of them, so that its distance is a lower bound.

    Args:
        model: the name that the server knows it by.

    Raises:
        RewardError: no URL.
    """

    overlaps = True

    def __init__(self, model: str, judge: JudgeSettings, settings: RemoteSettings) -> None:
        self.name = f"{VLM_PREFIX}{model}"
        self._judge = judge
        self._endpoint = Endpoint(self.name, judge.endpoint or "", model, settings)

    def check_prompts(self, prompts: list[str], metadata: Metadata) -> None:
        """Refuses questions of another form."""
        questions_of(self.name, self._judge, prompts, metadata)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """One request for every question.

        Raises:
            RewardError: the server fails, gives no log-probabilities, or its model gives neither answer.
        """
        asked = questions_of(self.name, self._judge, prompts, metadata)
        rows = [row for row, of_one in enumerate(asked) for _ in of_one]
        questions = [question for of_one in asked for question in of_one]
        choices = self._endpoint.ask(
            images[rows],
            [question.text for question in questions],
            max_tokens=1,
            logprobs=True,
            top_logprobs=TOP_LOGPROBS,
        )
        odds = torch.tensor([self._odds(*pair) for pair in zip(choices, questions, strict=True)])
        counts = torch.tensor([len(of_one) for of_one in asked])
        return Scored(torch.zeros(len(prompts)).index_add(0, torch.tensor(rows), odds) / counts)

    def _odds(self, choice: dict[str, Any], question: Question) -> float:
        try:
            first = choice["logprobs"]["content"][0]["top_logprobs"]
            likeliest = [(str(one["token"]).strip().casefold(), float(one["logprob"])) for one in first]
            floor = min(value for _, value in likeliest)
        except (KeyError, IndexError, TypeError, ValueError):
            raise RewardError(
                f"reward '{self.name}': expected `logprobs` with `top_logprobs` of the first token, got none in "
                f"{choice!r:.200}; the server must give log-probabilities"
            ) from None
        right = _of(question.right, likeliest)
        if question.wrong is None:
            probability = math.exp(logsumexp(right or [floor]))
            return math.log(probability) - math.log(max(1 - probability, LEAST))
        wrong = _of(question.wrong, likeliest)
        if not right and not wrong:
            raise RewardError(
                f"reward '{self.name}': expected {question.right} or {question.wrong} among the likeliest answers, got "
                f"{', '.join(repr(token) for token, _ in likeliest[:5])}; ask another --vlm_question, or take other "
                "--vlm_answers"
            )
        return float(logsumexp(right or [floor]) - logsumexp(wrong or [floor]))


def _of(answer: str, likeliest: list[tuple[str, float]]) -> list[float]:
    """The log-probabilities of an answer's spellings, among tokens without spaces and case."""
    forms = {form.strip().casefold() for form in spellings(answer)}
    return [value for token, value in likeliest if token in forms]
