"""Text that is drawn, and read by a real recogniser."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.vlm_checkpoints import write_got_ocr, write_trocr, write_vlm
from rlr_peft.errors import RewardError
from rlr_peft.plan import reward_memory
from rlr_peft.rewards import Reward, load_reward, measure_images, read_inputs
from rlr_peft.rewards.ocr import asked_texts, plain, similarity


@pytest.fixture(scope="module")
def reward() -> Reward:
    pytest.importorskip("rapidocr", reason="the extra [ocr] is not installed")
    return load_reward("ocr")


def drawn(*texts: str) -> torch.Tensor:
    """White images (B, 3, 160, 220) with a text each; the recogniser scales the shorter side to 736 pixels."""
    images = []
    for text in texts:
        image = Image.new("RGB", (220, 160), "white")
        ImageDraw.Draw(image).text((12, 60), text, fill=(120, 0, 0), font=ImageFont.load_default(28))
        images.append(torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255)
    return torch.stack(images)


def test_drawn_text_is_read_and_compared_with_quotes_or_metadata(reward: Reward) -> None:
    prompts, metadata = ['A shop sign that says "Hello World", at night'] * 3, [{}, {}, {"text": "Open"}]
    measured = measure_images(reward, drawn("HELLO WORLD", "HELLO WORMS", "OPEN SALE"), prompts, metadata)
    # Two of ten letters are wrong; half of what is read was not asked for.
    assert measured.scores.tolist() == pytest.approx([1, 1 - 2 / 10, 1 / 2])
    assert measured.info["exact"].tolist() == [1, 0, 0]
    assert reward.differentiable is False


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ('A sign that says "Stop" and "Go now"', "stopgonow"),
        ("A sign with “Stop” on it", "stop"),
        ("A mug with the word 'Coffee' on it, the cats' mug", "coffee"),
    ],
)
def test_quotes_of_all_kinds_say_what_is_asked(prompt: str, asked: str) -> None:
    assert asked_texts("ocr", [prompt], [{}]) == [asked]


def test_a_prompt_without_text_is_refused_before_training(reward: Reward) -> None:
    with pytest.raises(RewardError, match=r"expected the text to be written in quotes.*got neither for sample 1"):
        reward.check_prompts(['"a"', "the cats' and the dogs' house"], [{}, {}])


def test_similarity_of_known_words() -> None:
    words = [("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0), ("abcd", "acbd", 2)]
    for one, other, distance in words:
        expected = 1 - distance / max(len(one), len(other))
        assert similarity()(one, other) == pytest.approx(expected)
    assert plain(" Straße \n OPEN") == "strasseopen"


@pytest.mark.parametrize("write", [write_trocr, write_got_ocr])
def test_what_a_model_of_transformers_writes_is_compared(
    write: Callable[[Path], tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side is the model's own processor and its own way of writing, on random weights."""
    pytest.importorskip("rapidfuzz", reason="the extra [ocr] is not installed")
    monkeypatch.setattr("rlr_peft.rewards.vlm.MOST_TOKENS", 6)  # random weights never come to an end
    torch.manual_seed(0)
    model, processor = write(tmp_path)
    images = drawn("OPEN", "SHUT")
    pictures = [Image.fromarray(pixels) for pixels in (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()]
    inputs = processor(images=pictures, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    texts = processor.tokenizer.batch_decode(written[:, start:], skip_special_tokens=True)
    assert all(map(plain, texts))
    reward = load_reward(f"ocr:{tmp_path}")
    assert reward.name == f"ocr:{tmp_path.name}" and reward.differentiable is False
    asked = [{"text": texts[0]}, {"text": texts[1] + texts[1]}]
    measured = measure_images(reward, images, ["a door"] * 2, asked)
    assert measured.scores.tolist() == pytest.approx([1, 1 / 2]) and measured.info["exact"].tolist() == [1, 0]
    with pytest.raises(RewardError, match=r"reward 'ocr:.*expected the text to be written in quotes"):
        reward.check_prompts(["a shop"], [{}])
    planned = reward_memory(f"ocr:{tmp_path}", 1)
    assert planned is not None and planned.weights == pytest.approx(4 * model.num_parameters(), rel=0.01)


def test_a_model_with_a_chat_template_is_asked_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rapidfuzz", reason="the extra [ocr] is not installed")
    monkeypatch.setattr("rlr_peft.rewards.vlm.MOST_TOKENS", 6)
    torch.manual_seed(0)
    network, images = write_vlm(tmp_path, "qwen2_vl"), drawn("OPEN")
    reward: Any = load_reward(f"ocr:{tmp_path}")
    inputs = read_inputs("ocr", tmp_path, network.config)(images, ["OCR:"])
    written = network.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    text = reward._inputs.tokenizer.batch_decode(written, skip_special_tokens=True)[0]
    assert plain(text) and measure_images(reward, images, ["a door"], [{"text": text}]).scores.item() == 1
