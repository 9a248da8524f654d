"""Single images for the card: the gallery, and base and adapter side by side at full size."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rlr_peft.figures import save_image, save_video
from rlr_peft.prompt import PromptLike, as_prompt
from rlr_peft.publishing.record import ImagePair

FOLDER = "images"
MAX_GALLERY = 6
MAX_PAIRS = 4


def clear_card_images(output_dir: Path) -> None:
    """Removes those of an earlier run into the same folder."""
    for kind in ("validation", "base", "adapter", "condition"):
        for path in (output_dir / FOLDER).glob(f"{kind}_*"):
            path.unlink()


def save_gallery(output_dir: Path, images: Tensor, prompts: Sequence[str], fps: int | None) -> None:
    """Saves the first image or video of every prompt as `images/validation_I.*`.

    Args:
        images: (N, 3, H, W) or videos (N, F, 3, H, W) in [0, 1].
        prompts: N prompts, equal ones beside each other.
        fps: frames per second of videos.
    """
    for number, prompt in enumerate(list(dict.fromkeys(prompts))[:MAX_GALLERY]):
        image, path = images[prompts.index(prompt)], output_dir / FOLDER / f"validation_{number}"
        if image.ndim == 4:
            save_video(path, image, fps or 8)
        else:
            save_image(path.with_suffix(".png"), image)


def gallery(output_dir: Path, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """What `save_gallery` left: file name in the card's folder, and prompt."""
    found = []
    for number, prompt in enumerate(list(dict.fromkeys(map(str, prompts)))[:MAX_GALLERY]):
        found += [
            (f"{FOLDER}/{path.name}", str(prompt))
            for path in sorted((output_dir / FOLDER).glob(f"validation_{number}.*"))
        ]
    return found


def save_pairs(
    output_dir: Path,
    prompts: Sequence[PromptLike],
    images: tuple[Tensor, Tensor],
    scores: tuple[Tensor, Tensor],
    drawn: tuple[int, int] | None = None,
    image_area: int | None = None,
) -> list[ImagePair]:
    """Saves the first images of the comparison as `images/base_I.png` and `images/adapter_I.png`, and the pictures that
    they were drawn from, if there are any, as `images/condition_I.png`.

    Args:
        prompts: n of them.
        images: of base and adapter, each (k, 3, H, W) in [0, 1] of the first k <= n prompts.
        scores: of base and adapter, each (n,): the trained reward.
        drawn: width and height that were drawn, of videos those of a frame; None for those of the images.
        image_area: pixels of the pictures that they were drawn from, where these are more than what was drawn.
    """
    pairs = []
    for number, (prompt, *both) in enumerate(zip(prompts[:MAX_PAIRS], *images)):
        files = [f"{FOLDER}/{name}_{number}.png" for name in ("base", "adapter")]
        for file, image in zip(files, both, strict=True):
            save_image(output_dir / file, image)
        base, adapter = files
        condition, picture = None, as_prompt(prompt).image
        if picture is not None:
            condition = f"{FOLDER}/condition_{number}.png"
            width, height = drawn or (images[0].shape[-1], images[0].shape[-2])
            picture.fitted(width, height, image_area).save(output_dir / condition)
        before, after = (float(of_one[number]) for of_one in scores)
        pairs.append(ImagePair(str(prompt), base, adapter, before, after, condition))
    return pairs
