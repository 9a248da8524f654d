"""UnifiedReward: scores that a model writes, behind an endpoint and here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.large_parity import unified_parity
from benchmarks.reward_parity import mixed_images, to_tensor
from benchmarks.vlm_checkpoints import write_vlm
from benchmarks.vlm_parity import published_inputs, published_processor
from rlr_peft.errors import RewardError
from rlr_peft.rewards import (
    JudgeSettings,
    ModelFiles,
    ModelSettings,
    RemoteSettings,
    RewardSettings,
    load_reward,
    measure_images,
    read_scores,
    score_images,
)
from rlr_peft.rewards.model_files import UNIFIED_REWARD, UNIFIED_REWARD_CODE
from tests.prompts.chat_server import chat_server, completion

PROMPTS = ["a red fox", "{boats} at sea"]
SCRIPT = """
raise SystemExit
prompt = ''
problem = ('Look.\\n' 'Rate it.\\n' f'Caption: [{prompt}]')
print(f'{output}')
"""
ANSWER = "Alignment Score (1-5): {}\nCoherence Score (1-5): {}\nStyle Score (1-5): {}\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "point_score_ACS_image_generation.py"
    path.write_text(SCRIPT)
    return path


def reward(script: Path, url: str | None = None, model: Path | None = None) -> Any:
    files = ModelFiles({UNIFIED_REWARD_CODE: str(script), UNIFIED_REWARD: str(model)})
    return load_reward(
        "unifiedreward",
        RewardSettings(
            ModelSettings(files=files), RemoteSettings(timeout=5, batch_size=1), JudgeSettings(endpoint=url)
        ),
    )


def test_an_endpoint_is_asked_the_published_question_and_its_scores_are_averaged(script: Path) -> None:
    answers = [completion(ANSWER.format("2.6947", "2.3715", "2.8025")), completion(ANSWER.format(1, 5, 3))]
    with chat_server(*answers) as server:
        measured = measure_images(reward(script, server.url), torch.rand(2, 3, 4, 4), PROMPTS)
    assert measured.scores.tolist() == pytest.approx([(2.6947 + 2.3715 + 2.8025) / 3, 3])
    assert measured.info["style"].tolist() == pytest.approx([2.8025, 3])
    asked = [request["messages"][0]["content"][1]["text"] for request in server.requests]
    assert asked == ["Look.\nRate it.\nCaption: [a red fox]", "Look.\nRate it.\nCaption: [{boats} at sea]"]
    assert server.requests[0]["model"] == "UnifiedReward"


@pytest.mark.parametrize(
    "answer",
    ["I cannot see it.", ANSWER.format(1, 2, 7), ANSWER.format(1, 2, "x"), ANSWER.format(1, 2, 3) * 2, ""],
)
def test_an_answer_that_is_none_is_shown_and_never_a_number(answer: str) -> None:
    with pytest.raises(RewardError, match="expected the scores for alignment, coherence and style") as error:
        read_scores([ANSWER.format(1, 2, 3), answer], PROMPTS)
    assert repr(answer) in str(error.value) and "sample 1" in str(error.value)


def test_a_model_here_writes_what_it_writes_through_its_own_processor(script: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_vlm(tmp_path / "model", "qwen2_5_vl")
    images = mixed_images((32, 32), 1)
    inputs = published_inputs(
        published_processor(tmp_path / "model", "qwen2_5_vl"), images, ["Look.\nRate it.\nCaption: [a red fox]"]
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    written = model.generate(**inputs, max_new_tokens=256, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    judge = reward(script, model=tmp_path / "model")
    text = judge._inputs.tokenizer.decode(written, skip_special_tokens=True)
    assert judge.differentiable is False and len(text) > 20
    with pytest.raises(RewardError, match="got the answer") as error:
        score_images(judge, to_tensor(images), PROMPTS[:1])
    assert f"{text!r:.400}" in str(error.value)


def test_the_first_word_is_as_likely_as_through_its_own_processor(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        parity = unified_parity(tmp_path)
    assert parity["network"] < 1e-4 and parity["whole"] < 0.1 * parity["spread"]
