"""A judge behind an OpenAI-compatible endpoint, over real HTTP on loopback."""

import base64
import io
import json
import math
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from rlr_peft.errors import RewardError
from rlr_peft.rewards import JudgeSettings, RemoteSettings, RewardSettings, load_reward, score_images
from tests.prompts.chat_server import chat_server

PROMPTS = ["a fox", "boats"]


def likely(**tokens: float) -> tuple[int, bytes]:
    """An answer with probabilities of first tokens; `_` stands for a space."""
    likeliest = [{"token": token.replace("_", " "), "logprob": math.log(value)} for token, value in tokens.items()]
    first = {"token": likeliest[0]["token"], "logprob": likeliest[0]["logprob"], "top_logprobs": likeliest}
    choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "logprobs": {"content": [first]}}
    return 200, json.dumps({"choices": [choice]}).encode()


def judge(url: str, batch_size: int = 1, **values: Any) -> Any:
    settings = RemoteSettings(timeout=5, retries=1, backoff=0, batch_size=batch_size)
    return load_reward("vlm:owner/judge", RewardSettings(remote=settings, judge=JudgeSettings(endpoint=url, **values)))


def test_the_odds_of_yes_over_all_spellings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
    images = torch.rand(2, 3, 5, 7, requires_grad=True)
    with chat_server(likely(Yes=0.5, _yes=0.1, No=0.2, Maybe=0.1), likely(no=0.7, Perhaps=0.1, Who=0.01)) as server:
        reward = judge(server.url)
        scores = score_images(reward, images, PROMPTS)
    assert reward.name == "vlm:owner/judge" and reward.differentiable is False and not scores.requires_grad
    # Of the second one "yes" is unlikelier than all that was told.
    assert scores.tolist() == pytest.approx([math.log(0.6 / 0.2), math.log(0.01 / 0.7)], abs=1e-5)
    assert server.paths == ["/v1/chat/completions"] * 2
    assert server.headers[0]["Authorization"] == "Bearer sk-of-a-test"
    asked = server.requests[0]
    assert (asked["model"], asked["max_tokens"], asked["logprobs"], asked["temperature"]) == ("owner/judge", 1, True, 0)
    picture, text = asked["messages"][0]["content"]
    assert text["text"] == 'Does this image show "a fox"? Answer with one word, yes or no.'
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))))
    expected = (images[0].detach() * 255).round().byte().permute(1, 2, 0).numpy()
    assert numpy.array_equal(numpy.asarray(sent), expected)


def test_every_question_of_a_checklist_is_asked_and_several_at_once() -> None:
    with chat_server(likely(yes=0.5, no=0.25)) as server:
        metadata = [{"questions": ["One?", "Two?", "Three?"]}, {"question": "Four?"}]
        scores = score_images(judge(server.url, batch_size=4), torch.rand(2, 3, 4, 4), PROMPTS, metadata)
    assert scores.tolist() == pytest.approx([math.log(2)] * 2)
    texts = [request["messages"][0]["content"][1]["text"] for request in server.requests]
    assert sorted(texts) == ["Four?", "One?", "Three?", "Two?"]


def test_pairs_of_geneval_2_are_odds_of_their_own_answers() -> None:
    answers = [likely(four=0.5, _Four=0.2, **{"4": 0.1}, three=0.1), likely(Yes=0.8, No=0.2), likely(no=0.6, yes=0.3)]
    pairs = [["How many bicycles?", "four"], ["Are they white?", "Yes"], ["Are there cows?", "No"]]
    with chat_server(*answers) as server:
        scores = [
            score_images(judge(server.url), torch.rand(1, 3, 4, 4), ["x"], [{"vqa_list": [pair]}]).item()
            for pair in pairs
        ]
    assert scores == pytest.approx([math.log(0.8 / 0.2), math.log(4), math.log(2)], abs=1e-5)
    assert server.requests[0]["messages"][0]["content"][1]["text"] == "How many bicycles? Answer in one word."


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (likely(Sure=0.9, A=0.1), "expected yes or no among the likeliest answers, got 'sure', 'a'"),
        ((200, b'{"choices": [{"message": {"content": "Yes"}}]}'), "the server must give log-probabilities"),
        ((200, b'{"choices": []}'), "expected an OpenAI chat completion, got"),
        ((404, b'{"error": "no such model"}'), "answered 404 Not Found: .*no such model"),
    ],
)
def test_what_is_no_answer_stops_the_run(answer: tuple[int, bytes], message: str) -> None:
    with chat_server(answer) as server, pytest.raises(RewardError, match=message):
        score_images(judge(server.url), torch.rand(1, 3, 4, 4), PROMPTS[:1])


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(RewardError, match=r"--vlm_endpoint 'ftp://host': expected http"):
        judge("ftp://host")
