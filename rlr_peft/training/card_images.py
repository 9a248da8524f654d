"""Single images for the card: the gallery, and base and adapter side by side at full size."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor, uint8

from rlr_peft.compare.evaluation import Evaluation
from rlr_peft.evaluation.videos import save_video
from rlr_peft.publishing.run_record import ImagePair

FOLDER = "images"
MAX_GALLERY = 6
MAX_PAIRS = 4


def clear_card_images(output_dir: Path) -> None:
    """Removes those of an earlier run into the same folder."""
    for kind in ("validation", "base", "adapter"):
        for path in (output_dir / FOLDER).glob(f"{kind}_*"):
            path.unlink()


def save_gallery(output_dir: Path, images: Tensor, prompts: Sequence[str], fps: int | None) -> None:
    """Saves the first image or video of every prompt as `images/validation_I.*`.

    Args:
        output_dir: the card's folder.
        images: (N, 3, H, W) or videos (N, F, 3, H, W) in [0, 1].
        prompts: N prompts, equal ones beside each other.
        fps: frames per second of videos.
    """
    (output_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(list(dict.fromkeys(prompts))[:MAX_GALLERY]):
        image, path = images[prompts.index(prompt)], output_dir / FOLDER / f"validation_{number}"
        if image.ndim == 4:
            save_video(path, image, fps or 8)
        else:
            _save(image, path.with_suffix(".png"))


def gallery(output_dir: Path, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """What `save_gallery` left: file name in the card's folder, and prompt."""
    found = []
    for number, prompt in enumerate(list(dict.fromkeys(map(str, prompts)))[:MAX_GALLERY]):
        found += [
            (f"{FOLDER}/{path.name}", str(prompt))
            for path in sorted((output_dir / FOLDER).glob(f"validation_{number}.*"))
        ]
    return found


def save_pairs(output_dir: Path, before: Evaluation, after: Evaluation) -> list[ImagePair]:
    """Saves the first images of the comparison as `images/base_I.png` and `images/adapter_I.png`; of videos strips."""
    (output_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    pairs = []
    for number in range(min(MAX_PAIRS, len(before.images), len(after.images))):
        names = {}
        for kind, evaluation in (("base", before), ("adapter", after)):
            names[kind] = f"{FOLDER}/{kind}_{number}.png"
            _save(evaluation.images[number], output_dir / names[kind])
        scores = [float(evaluation.scores["reward"][number]) for evaluation in (before, after)]
        pairs.append(ImagePair(str(before.prompts[number]), names["base"], names["adapter"], *scores))
    return pairs


def _save(image: Tensor, path: Path) -> None:
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, format="PNG", optimize=True)
