"""The single images of a card."""

from pathlib import Path

import torch
from PIL import Image

from rlr_peft.training import clear_card_images, gallery, save_gallery, save_pairs


def test_the_gallery_shows_the_first_image_or_video_of_every_prompt(tmp_path: Path) -> None:
    prompts = ["a cat", "a cat", "a dog"]
    save_gallery(tmp_path, torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 4, 4), prompts, None)
    assert gallery(tmp_path, prompts) == [("images/validation_0.png", "a cat"), ("images/validation_1.png", "a dog")]
    pixels = [Image.open(tmp_path / name).getpixel((0, 0)) for name, _ in gallery(tmp_path, prompts)]
    assert pixels == [(0, 0, 0), (255, 255, 255)]
    clear_card_images(tmp_path)
    assert gallery(tmp_path, prompts) == []
    save_gallery(tmp_path, torch.rand(1, 5, 3, 8, 8), ["a cat runs"], 4)
    ((name, prompt),) = gallery(tmp_path, ["a cat runs"])
    assert prompt == "a cat runs" and Path(name).suffix in (".gif", ".mp4") and (tmp_path / name).stat().st_size > 0


def test_pairs_are_the_first_of_the_comparison_with_their_scores(tmp_path: Path) -> None:
    images = (torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    scores = (torch.zeros(2), torch.tensor([1.0, 0.5]))
    first, second = save_pairs(tmp_path, ["a cat", "a dog"], images, scores)
    assert (first.prompt, first.base_score, first.adapter_score) == ("a cat", 0.0, 1.0)
    assert (second.prompt, second.adapter_score) == ("a dog", 0.5)
    assert Image.open(tmp_path / first.base).getpixel((0, 0)) == (0, 0, 0)
    assert Image.open(tmp_path / second.adapter).getpixel((0, 0)) == (255, 255, 255)
