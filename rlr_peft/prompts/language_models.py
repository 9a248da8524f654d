"""Language models that split prompts into stages: a local one of ``transformers``, or one behind an endpoint."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jinja2 import TemplateError

from rlr_peft.json_server import JsonServer, ServerError, read_address
from rlr_peft.prompt import PromptError
from rlr_peft.prompts.chain_of_thought import MalformedStagesError, parse_stages
from rlr_peft.redaction import redacted_address

logger = logging.getLogger(__name__)

TRIES = 3
"""Answers asked for before a prompt is given up."""
MAX_NEW_TOKENS = 400
CONNECTION_RETRIES = 3
# Seconds: for one try as a whole, until the answer's last byte, and of the first wait between tries, see `JsonServer`.
TIMEOUT, BACKOFF = 120.0, 1.0


class LanguageModel(Protocol):
    """Answers a question.

    Attributes:
        name: for messages.
    """

    @property
    def name(self) -> str: ...

    def answer(self, instructions: str, question: str, attempt: int) -> str:
        """The model's text; ``attempt`` counts from 0, and later ones may be drawn at random."""
        ...


class LanguageModelDecomposer:
    """Asks a language model for stage prompts; malformed answers are rejected and asked for again.

    Args:
        names: of the stages, noise first.
    """

    def __init__(self, model: LanguageModel, names: Sequence[str]) -> None:
        self._model = model
        self._names = tuple(names)

    def __call__(self, prompt: str) -> tuple[str, ...]:
        """The stage prompts of a prompt.

        Raises:
            PromptError: no answer was of the right form, or the model cannot be reached.
        """
        for attempt in range(TRIES):
            answer = self._model.answer(instructions(self._names), prompt, attempt)
            try:
                return parse_stages(answer, self._names)
            except MalformedStagesError as error:
                problem = error
                logger.warning(
                    "prompt %r: rejected answer %d of at most %d of %s: %s.",
                    *(prompt, attempt + 1, TRIES, self._model.name, error),
                )
        raise PromptError(
            f"prompt {prompt!r}: {self._model.name} gave no stage prompts in {TRIES} tries; the last "
            f"answer: {problem}: {answer!r:.300}. Write its line into the file of stage prompts (--dcot_cache) by "
            "hand, or take another model"
        )


def instructions(names: Sequence[str]) -> str:
    """What the model is told to do."""
    example = ", ".join(f'"{name}": "..."' for name in names)
    return (
        "An image is drawn in stages, from its overall layout to its finest details. Split the user's image prompt "
        f"into one prompt for each of the stages {', '.join(names)}, in this order: the first says what lies where and "
        "sets the background, the last gives textures and small details. Name the main subject in every one of them, "
        f"add nothing that the prompt does not say, and answer with one JSON object only: {{{example}}}"
    )


class TransformersModel:
    """A local text-generation model: greedy at first, then at random with fixed seeds.

    Raises:
        PromptError: the model cannot be loaded.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = name
        try:
            # Left to itself, transformers asks at the terminal whether to run what code the folder holds.
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self._model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False).to(device).eval()
        except (OSError, ValueError) as error:
            raise PromptError(f"dcot_model '{name}': cannot be loaded: {' '.join(str(error).split())}") from error

    @torch.no_grad()
    def answer(self, instructions: str, question: str, attempt: int) -> str:
        """The continuation of instructions and question, through the model's chat template if it has one."""
        inputs = self._inputs(instructions, question).to(self._model.device)
        length = inputs["input_ids"].shape[1]
        room = getattr(self._model.config, "max_position_embeddings", None) or length + MAX_NEW_TOKENS
        if room <= length:
            raise PromptError(f"prompt {question!r}: {self.name} takes {room} tokens, and the question has {length}")
        with torch.random.fork_rng(devices=[self._model.device] if self._model.device.type == "cuda" else []):
            torch.manual_seed(attempt)
            output = self._model.generate(
                **inputs,
                do_sample=attempt > 0,
                max_new_tokens=min(MAX_NEW_TOKENS, room - length),
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
            )
        return str(self._tokenizer.decode(output[0, length:], skip_special_tokens=True))

    def _inputs(self, instructions: str, question: str) -> Any:
        if self._tokenizer.chat_template is None:
            return self._tokenizer(f"{instructions}\n{question}\n", return_tensors="pt")
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": question}]
        try:
            return self._from_template(messages)
        except TemplateError:  # some models, such as Gemma 2, know no system message
            return self._from_template([{"role": "user", "content": f"{instructions}\n\n{question}"}])

    def _from_template(self, messages: list[dict[str, str]]) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint, asked through ``POST {url}/chat/completions``.

    Args:
        url: up to and without ``/chat/completions``, for example ``http://localhost:8000/v1``.
        model: the name that the server knows it by.
        api_key: sent as bearer token; None for servers that want none.

    Raises:
        PromptError: no URL.
    """

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        try:
            parts = read_address(url)
        except ValueError as error:
            raise PromptError(f"dcot_endpoint '{redacted_address(url)}': {error}") from None
        # A query, such as the version of the API that some servers ask for, stays at the end.
        asked = parts._replace(path=f"{parts.path.rstrip('/')}/chat/completions").geturl()
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._server = JsonServer(asked, TIMEOUT, CONNECTION_RETRIES, BACKOFF, headers)
        self.name = f"{model} at {parts.hostname}"
        self._model = model

    def answer(self, instructions: str, question: str, attempt: int) -> str:
        """The content of the first choice.

        Raises:
            PromptError: the server cannot be reached, refuses, or answers in another form.
        """
        body = {
            "model": self._model,
            "messages": [{"role": "system", "content": instructions}, {"role": "user", "content": question}],
            "temperature": 0.0 if attempt == 0 else 0.7,
            "seed": attempt,
            "max_tokens": MAX_NEW_TOKENS,
        }
        try:
            answer = self._server.ask(body)
        except ServerError as error:
            raise PromptError(f"prompt {question!r}: {self.name} {error}") from None
        try:
            content = answer["choices"][0]["message"]["content"]
            if not isinstance(
                content, str | None
            ):  # null of a model that ran out of tokens; it may do better next time
                raise TypeError
            return content or ""
        except (KeyError, IndexError, TypeError):
            raise PromptError(
                f"prompt {question!r}: expected an OpenAI chat completion from {self.name}, got "
                f"{self._server.shown(answer)}"
            ) from None
