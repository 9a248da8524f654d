"""Text that is drawn, and read by a real recogniser."""

import numpy
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rlr_peft.errors import RewardError
from rlr_peft.rewards import Reward, load_reward, measure_images
from rlr_peft.rewards.ocr import plain


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
def test_quotes_of_all_kinds_say_what_is_asked(reward: Reward, prompt: str, asked: str) -> None:
    assert reward._asked([prompt], [{}]) == [asked]  # type: ignore[attr-defined]


def test_a_prompt_without_text_is_refused_before_training(reward: Reward) -> None:
    with pytest.raises(RewardError, match=r"expected the text to be written in quotes.*got neither for sample 1"):
        reward.check_prompts(['"a"', "the cats' and the dogs' house"], [{}, {}])


def test_similarity_of_known_words(reward: Reward) -> None:
    words = [("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0), ("abcd", "acbd", 2)]
    for one, other, distance in words:
        expected = 1 - distance / max(len(one), len(other))
        assert reward._similarity(one, other) == pytest.approx(expected)  # type: ignore[attr-defined]
    assert plain(" Straße \n OPEN") == "strasseopen"
