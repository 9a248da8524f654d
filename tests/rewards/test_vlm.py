"""A vision-language model as a judge, on tiny checkpoints of the real classes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from benchmarks.reward_parity import mixed_images, to_tensor
from benchmarks.vlm_parity import KINDS, judge_parity, published_inputs, published_processor
from rlr_peft.errors import RewardError
from rlr_peft.rewards import JudgeSettings, ModelSettings, RewardSettings, load_reward, read_inputs, score_images

PROMPTS = ["a red fox", "two boats at sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judges")


@pytest.fixture(scope="module")
def parity(folder: Path) -> dict[str, dict[str, float]]:
    """Writes one model of every kind."""
    with torch.random.fork_rng(devices=[]):
        return {kind: judge_parity(folder / kind, kind) for kind in KINDS}


def judge(folder: Path, kind: str, **values: Any) -> Any:
    return load_reward(f"vlm:{folder / kind}", RewardSettings(judge=JudgeSettings(**values)))


def pixels(count: int = 2) -> torch.Tensor:
    return to_tensor(mixed_images((40, 52), count))


@pytest.mark.parametrize("kind", list(KINDS))
def test_scores_are_those_of_the_models_own_processor_and_network(
    parity: dict[str, dict[str, float]], kind: str
) -> None:
    measured = parity[kind]
    assert measured["spread"] > 0.05, "scores that are all alike would prove nothing"
    assert measured["network"] < 1e-4 * max(1, measured["spread"])
    assert measured["whole"] < 0.1 * measured["spread"]


@pytest.mark.parametrize("shape", [(32, 32), (70, 90), (31, 90), (13, 60), (260, 500)], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_images_and_texts_are_read_as_the_models_own_processor_does(
    folder: Path, parity: Any, kind: Any, shape: tuple[int, int]
) -> None:
    images = mixed_images(shape, 2)
    network = judge(folder, kind).network
    got = read_inputs("judge", folder / kind, network.config)(to_tensor(images), ["Is it?", "Is it a longer one?"])
    expected = published_inputs(published_processor(folder / kind, kind), images, ["Is it?", "Is it a longer one?"])
    expected.pop("pixel_attention_mask", None)  # all ones, of images of one size
    assert got.keys() == expected.keys()
    for name in got.keys() - {"pixel_values"}:
        assert torch.equal(got[name], expected[name]), name
    difference = (got["pixel_values"] - expected["pixel_values"]).abs()
    # The published way rounds to 8 bits after every resize; one step is 1 / 255 / .26 = .015.
    assert difference.max() < 0.04 and difference.mean() < 0.01


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_match_finite_differences(folder: Path, parity: Any, kind: str) -> None:
    reward = judge(folder, kind)
    reward.network.double()
    images = (0.35 + 0.3 * pixels()).requires_grad_(True)  # off the clamps
    (gradient,) = torch.autograd.grad(score_images(reward, images, PROMPTS).sum(), images)
    assert all(float(sample.abs().sum()) > 0 for sample in gradient)
    direction, step = gradient / gradient.norm(), 0.005
    with torch.no_grad():
        ahead, behind = (
            score_images(reward, images + sign * step * direction, PROMPTS).double().sum() for sign in (1, -1)
        )
    assert float((ahead - behind) / (2 * step)) == pytest.approx(float(gradient.norm()), rel=0.01)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "smolvlm"])
def test_a_checklist_is_the_mean_of_its_questions(folder: Path, parity: Any, kind: str) -> None:
    reward = judge(folder, kind)
    questions = ["Is there a fox?", "Is it red, and is it asleep?", "Who knows?"]
    single = [
        score_images(reward, pixels(1), ["a fox"], [{"question": question}]).item()  # without padding
        for question in questions
    ]
    both = score_images(reward, pixels(1).repeat(2, 1, 1, 1), PROMPTS, [{"questions": questions}, {}])
    assert both[0].item() == pytest.approx(sum(single) / 3, abs=1e-4)
    assert both[1].item() == pytest.approx(score_images(reward, pixels(1), PROMPTS[1:]).item(), abs=1e-4)
    assert len({round(value, 3) for value in single}) == 3


def test_a_pair_gives_the_odds_of_its_own_answer(folder: Path, parity: Any) -> None:
    reward = judge(folder, "qwen2_5_vl")
    asked = ["Is it so? Answer in one word.", "How many?"]
    plain = score_images(reward, pixels(1), ["x"], [{"question": asked[0]}]).item()
    for answer, sign in (("Yes", 1), ("no", -1)):
        metadata = [{"vqa_list": [["Is it so?", answer]]}]
        pair = score_images(reward, pixels(1), ["x"], metadata)
        assert pair.item() == pytest.approx(sign * plain, abs=1e-5)
    # Of another answer: its probability against all others, by the first letter, small or large, or a number's digit.
    with torch.no_grad():
        inputs = reward._inputs(pixels(1), ["How many? Answer in one word."])
        probabilities = reward.network(**inputs).logits[0, -1].softmax(0)
    right = sum(float(probabilities[reward._inputs.tokenizer.convert_tokens_to_ids(letter)]) for letter in "fF4")
    odds = score_images(reward, pixels(1), ["x"], [{"questions": [[asked[1], "four"]]}]).item()
    assert odds == pytest.approx(math.log(right / (1 - right)), abs=1e-4)


def test_question_and_answers_are_as_asked(folder: Path, parity: Any) -> None:
    images = pixels()
    turned = score_images(judge(folder, "qwen3_vl", answers=("no", "yes")), images, PROMPTS)
    torch.testing.assert_close(turned, -score_images(judge(folder, "qwen3_vl"), images, PROMPTS))
    template = judge(folder, "qwen3_vl", question="Is {prompt} in {braces}?")
    explicit = [{"question": f"Is {prompt} in {{braces}}?"} for prompt in PROMPTS]
    torch.testing.assert_close(
        score_images(template, images, PROMPTS), score_images(judge(folder, "qwen3_vl"), images, PROMPTS, explicit)
    )
    with pytest.raises(RewardError, match="expected answers that begin with different tokens, got 'nob' and 'nod'"):
        judge(folder, "qwen3_vl", answers=("nob", "nod"))
    with pytest.raises(RewardError, match=r"`questions` in the metadata to be a list .* got \[1\] for sample 1"):
        score_images(template, images, PROMPTS, [{}, {"questions": [1]}])


def test_a_template_of_its_own_file_wins(folder: Path, parity: Any, tmp_path: Path) -> None:
    for file in (folder / "qwen2_vl").iterdir():
        (tmp_path / file.name).symlink_to(file)
    reward = judge(tmp_path.parent, tmp_path.name)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(RewardError, match="expected a chat template beside the model, got none"):
        judge(tmp_path.parent, tmp_path.name)
    template = (folder / "qwen2_vl" / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    older = judge(tmp_path.parent, tmp_path.name)
    assert torch.equal(score_images(older, pixels(), PROMPTS), score_images(reward, pixels(), PROMPTS))


def test_another_family_is_a_black_box_through_its_own_processor(folder: Path, parity: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "smolvlm")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = text | {"image_size": 16, "patch_size": 4, "projection_dim": 32}
    config = LlavaConfig(
        text_config=text | {"model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        clip,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)
    reward = judge(tmp_path.parent, tmp_path.name)
    assert reward.differentiable is False
    scores = score_images(reward, pixels().requires_grad_(True), PROMPTS)
    assert not scores.requires_grad and scores.unique().numel() == 2
    half: Any = load_reward(f"vlm:{tmp_path}", RewardSettings(ModelSettings(dtype=torch.bfloat16)))
    torch.testing.assert_close(score_images(half, pixels(), PROMPTS), scores, atol=0.1, rtol=0.1)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), CLIPImageProcessorPil)


def test_offline_the_repository_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RewardError, match="needs the Hub repository owner/judge, which is not in the local cache"
    ) as at:
        load_reward("vlm:owner/judge")
    assert "`hf download owner/judge`" in str(at.value)
    with pytest.raises(RewardError, match=r"expected a folder or a Hub id, got \./none"):
        load_reward("vlm:./none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RewardError, match="cannot be loaded"):
        load_reward(f"vlm:{tmp_path}")


def test_weights_are_in_bf16_where_others_are_in_fp16(folder: Path, parity: Any) -> None:
    settings = RewardSettings(ModelSettings(dtype=torch.float16))
    reward: Any = load_reward(f"vlm:{folder / 'qwen2_5_vl'}", settings)
    assert reward.network.dtype == torch.bfloat16
    assert reward.name == "vlm:qwen2_5_vl", "no folder of this machine"
    assert score_images(reward, pixels(), PROMPTS).dtype == torch.float32
