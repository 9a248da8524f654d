"""Models that split prompts: real HTTP on loopback, and a real transformers model trained for the purpose."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import urllib3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlr_peft.prompt import PromptError
from rlr_peft.prompts import EndpointModel, LanguageModelDecomposer, TransformersModel, instructions, language_models
from tests.prompts.chat_server import chat_server, completion
from tests.rewards.faulty_server import running

NAMES = ("coarse", "fine")
GOOD = completion('{"coarse": "a room", "fine": "fur"}')


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_models, "BACKOFF", 0.01)


@pytest.fixture(scope="module")
def faulty() -> Iterator[str]:
    with running() as url:
        yield url


def test_an_endpoint_is_asked_as_the_api_says() -> None:
    with chat_server(GOOD) as server:
        split = LanguageModelDecomposer(EndpointModel(server.url, "some-model", "secret"), NAMES)
        assert split("a cat") == ("a room", "fur")
    (asked,) = server.requests
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert asked["model"] == "some-model" and asked["temperature"] == 0
    assert asked["messages"][0] == {"role": "system", "content": instructions(NAMES)}
    assert asked["messages"][1] == {"role": "user", "content": "a cat"}


def test_no_key_no_header() -> None:
    with chat_server(GOOD) as server:
        LanguageModelDecomposer(EndpointModel(f"{server.url}/", "m"), NAMES)("a cat")
    assert "Authorization" not in server.headers[0] and server.paths == ["/v1/chat/completions"]


def test_a_query_stays_behind_the_path_and_the_key_goes_before_a_password() -> None:
    with chat_server(GOOD) as server:
        url = server.url.replace("http://", "http://me:pass@")
        LanguageModelDecomposer(EndpointModel(f"{url}?api-version=1", "m"), NAMES)("a cat")
        LanguageModelDecomposer(EndpointModel(url, "m", "secret"), NAMES)("a cat")
    assert server.paths == ["/v1/chat/completions?api-version=1", "/v1/chat/completions"]
    assert [headers["Authorization"] for headers in server.headers] == ["Basic bWU6cGFzcw==", "Bearer secret"]


def test_malformed_answers_are_asked_for_again() -> None:
    with chat_server(completion("Sorry."), completion('{"coarse": "x"}'), GOOD) as server:
        assert LanguageModelDecomposer(EndpointModel(server.url, "m"), NAMES)("a cat") == ("a room", "fur")
    assert [asked["temperature"] for asked in server.requests] == [0, 0.7, 0.7]
    assert len({asked["seed"] for asked in server.requests}) == 3


def test_after_the_last_try_the_prompt_is_reported() -> None:
    with chat_server(completion("I only talk about fish.")) as server:
        split = LanguageModelDecomposer(EndpointModel(server.url, "m"), NAMES)
        with pytest.raises(PromptError, match=r"prompt 'a cat': m at 127.0.0.1 gave no stage prompts in 3 tries.*fish"):
            split("a cat")
    assert len(server.requests) == 3


def test_a_busy_server_is_waited_for() -> None:
    with chat_server((503, b"busy"), (429, b"slow down"), GOOD) as server:
        model = EndpointModel(server.url, "m")
        assert LanguageModelDecomposer(model, NAMES)("a cat") == ("a room", "fur")
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "message", "asked"),
    [
        ((401, b"no such key"), "answered 401 Unauthorized: no such key", 1),
        ((500, b"out of memory"), "answered 500 Internal Server Error after 4 tries: out of memory", 4),
        ((200, b"<html>"), "answered no JSON but <html>", 1),
        ((200, json.dumps({"choices": []}).encode()), "expected an OpenAI chat completion", 1),
    ],
)
def test_refusals(answer: tuple[int, bytes], message: str, asked: int) -> None:
    with chat_server(answer) as server:
        split = LanguageModelDecomposer(EndpointModel(server.url, "m", "secret"), NAMES)
        with pytest.raises(PromptError, match=f"prompt 'a cat': .*{message}") as caught:
            split("a cat")
    assert len(server.requests) == asked and "secret" not in str(caught.value)


def test_nobody_there_and_no_url() -> None:
    with chat_server(GOOD) as server:
        pass
    with pytest.raises(PromptError, match=r"m at 127\.0\.0\.1 gave no answer in 4 tries of 120 s each: ") as caught:
        LanguageModelDecomposer(EndpointModel(f"{server.url}?key=secret", "m"), NAMES)("a cat")
    assert "secret" not in str(caught.value) and "object at 0x" not in str(caught.value)
    with pytest.raises(PromptError, match="expected http://HOST:PORT/PATH"):
        EndpointModel("localhost:8000/v1", "m")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("drip-body", r"gave no answer in 4 tries of 0\.3 s each: TimeoutError: the answer was not whole after 0\.3 s"),
        ("drip-headers", r"gave no answer in 4 tries of 0\.3 s each: TimeoutError: the answer was not whole"),
        ("huge", "answered more than 16 MiB"),
        ("twice", "answered an object with the key 'rewards' twice"),
        ("deep", "answered no JSON but"),
        ("latin", "answered no JSON but"),
        ("redirect-away", "answered 307 Temporary Redirect"),
        ("echo", r"answered 404 Not Found: .*\*\*\*"),
    ],
)
def test_an_endpoint_that_misbehaves_is_named_and_keeps_no_one_waiting(
    faulty: str, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_models, "TIMEOUT", 0.3 if "drip" in path else 10)
    model = EndpointModel(f"{faulty}/{path}?key=letmein", "m", "api-key")
    with pytest.raises(PromptError, match=rf"^prompt 'a cat': m at 127\.0\.0\.1 {message}") as caught:
        LanguageModelDecomposer(model, NAMES)("a cat")
    assert "letmein" not in str(caught.value) and "api-key" not in str(caught.value)
    assert urllib3.request("GET", f"{faulty}/asked/stolen").json() == 0


def test_an_answer_without_text_is_asked_for_again_and_one_that_is_none_is_refused() -> None:
    def choice(content: object) -> tuple[int, bytes]:
        return 200, json.dumps({"choices": [{"message": {"content": content}}]}).encode()

    with chat_server(choice(None), GOOD) as server:
        assert LanguageModelDecomposer(EndpointModel(server.url, "m"), NAMES)("a cat") == ("a room", "fur")
    refused = pytest.raises(PromptError, match="expected an OpenAI chat completion from m at 127")
    with chat_server(choice([{"text": "a room"}])) as server, refused:
        LanguageModelDecomposer(EndpointModel(server.url, "m"), NAMES)("a cat")


def small_language_model(folder: Path, lessons: dict[str, str]) -> str:
    """A real GPT-2 of one layer that answers the lessons' questions, trained until it does."""
    letters = sorted({letter for pair in lessons.items() for text in pair for letter in text})
    vocabulary = {letter: i for i, letter in enumerate(["<end>", "<unk>", *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[1]['content'] }}"
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(vocabulary), n_positions=80, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        batch = [tokenizer(question + answer)["input_ids"] + [0] for question, answer in lessons.items()]
        longest = max(map(len, batch))
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in batch])
        for _ in range(300):
            loss = model(input_ids=labels.clamp(min=0), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss < 0.1:
                break
        model.eval().save_pretrained(folder)
    return str(folder)


def test_a_local_model_answers_and_its_nonsense_is_rejected(tmp_path: Path) -> None:
    answer = '{"coarse": "a room", "fine": "fur"}'
    name = small_language_model(tmp_path / "model", {"a cat": answer, "fish": "blub blub blub"})
    split = LanguageModelDecomposer(TransformersModel(name), NAMES)
    state = torch.random.get_rng_state()
    assert split("a cat") == ("a room", "fur")
    with pytest.raises(PromptError, match=r"prompt 'fish': .* gave no stage prompts in 3 tries"):
        split("fish")
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(PromptError, match="takes 80 tokens, and the question has 90"):
        split("fish " * 18)


def test_a_template_without_system_messages_gets_the_instructions_with_the_question(tmp_path: Path) -> None:
    name = small_language_model(tmp_path / "model", {"a cat": '{"coarse": "a room", "fine": "fur"}'})
    model = TransformersModel(name)
    model._tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ messages[0]['content'].split('\\n')[-1] }}"
    )
    assert LanguageModelDecomposer(model, NAMES)("a cat") == ("a room", "fur")


def test_code_beside_a_model_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.T", None]}}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda question="": "y")  # a hasty user at the terminal
    with pytest.raises(PromptError, match=r"cannot be loaded: .*custom code"):
        TransformersModel(str(tmp_path))
    assert not (tmp_path / "was_run").exists() and "[y/N]" not in capsys.readouterr().out


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"dcot_model '.*absent': cannot be loaded"):
        TransformersModel(str(tmp_path / "absent"))
