"""tiny-shapes: a small Stable Diffusion pipeline, and the world that it was trained on, in drawings with captions.

A scene is one shape on a plain background, described by seven attributes. The words of different attributes never
coincide, so a caption can be read word by word, whatever it leaves out. Nothing here loads torch.

How scenes are drawn, and how the shipped weights were made, is in ``benchmarks/tiny_shapes``
(``python -m benchmarks.tiny_shapes.build``); two judges of the images are in ``rlr_peft/rewards/embedded.py``.

The pipeline was left imperfect on purpose: trained on true captions alone it draws nearly every prompt right and leaves
a reward nothing to improve. In the last quarter of its training some captions therefore name a similar shape, color or
texture (``benchmarks/tiny_shapes/denoiser.py``), as captions collected from the web do. Its images are crisp, but about
one shape or color in ten and one texture in four is not the one asked for.
"""

import functools
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PIPELINE_NAME = "tiny-shapes"
"""The name that stands for the shipped pipeline wherever a model name or path is asked for."""

IMAGE_SIZE = 64
"""Side of every drawing and of every generated image, in pixels."""


def pipeline_path() -> Path:
    """Folder of the shipped pipeline, for ``StableDiffusionPipeline.from_pretrained``."""
    return Path(__file__).parent / "pipeline"


def judges_path() -> Path:
    """Folder of the two shipped judges (one safetensors file each)."""
    return Path(__file__).parent / "judges"


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "background": ("gray", "sky", "sand", "navy", "forest", "brown"),
    "position": ("center", "top left", "top right", "bottom left", "bottom right"),
    "size": ("small", "large"),
    "shape": ("circle", "square", "triangle", "star", "heart", "ring", "moon", "cross"),
    "color": ("red", "orange", "yellow", "green", "blue", "purple", "pink"),
    "texture": ("plain", "striped", "dotted", "checkered"),
    "outline": ("none", "black", "white"),
}
"""Every attribute with its possible values."""

SCALES: dict[str, str] = {
    "background": "coarse",
    "position": "coarse",
    "size": "coarse",
    "shape": "mid",
    "color": "mid",
    "texture": "fine",
    "outline": "fine",
}
"""How much of the image an attribute governs: ``coarse`` (layout), ``mid`` (the object) or ``fine`` (its details)."""

Split = Literal["train", "test"]

_FILLER_WORDS = frozenset({"a", "an", "with", "in", "on", "the", "outline", "background", "shape"})
_OUTLINE_WORDS = {"no": "none", "black": "black", "white": "white"}
_VALUE_OF_WORD: dict[str, tuple[str, str]] = {
    word: (attribute, word)
    for attribute, values in ATTRIBUTES.items()
    if attribute not in ("position", "outline")
    for word in values
} | {"center": ("position", "center")}
_TEST_SHARE = 0.1


@dataclass(frozen=True)
class Scene:
    """One value per attribute; see ``ATTRIBUTES`` for the words allowed."""

    background: str
    position: str
    size: str
    shape: str
    color: str
    texture: str
    outline: str

    def __post_init__(self) -> None:
        for attribute, value in vars(self).items():
            _check_value(attribute, value)

    def caption(self) -> str:
        """The dense caption, which mentions every attribute."""
        return describe(vars(self))


def describe(attributes: Mapping[str, str]) -> str:
    """A caption that mentions exactly the given attributes, for example only those of one scale."""
    for attribute, value in attributes.items():
        _check_value(attribute, value)
    nouns = [attributes[name] for name in ("size", "color", "texture") if name in attributes]
    nouns.append(attributes.get("shape", "shape"))
    parts = ["an" if nouns[0][0] in "aeiou" else "a", *nouns]
    if "outline" in attributes:
        outline = attributes["outline"]
        parts += ["with", "no", "outline"] if outline == "none" else ["with", "a", outline, "outline"]
    if "position" in attributes:
        parts += ["in", "the", attributes["position"]]
    if "background" in attributes:
        parts += ["on", "a", attributes["background"], "background"]
    return " ".join(parts)


def parse_caption(text: str) -> dict[str, str]:
    """Read the attributes that a caption mentions; the inverse of ``describe``.

    Case and commas do not matter, nor does the order of the phrases. Attributes that are not mentioned are absent.

    Raises:
        ValueError: on a word outside the vocabulary, an incomplete position or outline, or contradicting values.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    found: dict[str, str] = {}
    index = 0
    while index < len(words):
        word = words[index]
        following = words[index + 1] if index + 1 < len(words) else ""
        index += 1
        if word in _FILLER_WORDS:
            continue
        if word in ("top", "bottom"):
            if following not in ("left", "right"):
                raise ValueError(f"{word!r} must be followed by 'left' or 'right' in the caption {text!r}")
            attribute, value = "position", f"{word} {following}"
            index += 1
        elif word in _OUTLINE_WORDS:
            if following != "outline":
                raise ValueError(f"{word!r} must be followed by 'outline' in the caption {text!r}")
            attribute, value = "outline", _OUTLINE_WORDS[word]
        elif word in _VALUE_OF_WORD:
            attribute, value = _VALUE_OF_WORD[word]
        else:
            known = ", ".join(caption_words())
            raise ValueError(f"unknown word {word!r} in the caption {text!r}; tiny-shapes knows: {known}")
        if found.setdefault(attribute, value) != value:
            raise ValueError(f"{attribute} is both {found[attribute]!r} and {value!r} in the caption {text!r}")
    return {attribute: found[attribute] for attribute in ATTRIBUTES if attribute in found}


def caption_words() -> tuple[str, ...]:
    """Every word that a caption may hold, sorted."""
    words = set(_FILLER_WORDS) | set(_OUTLINE_WORDS) | set(_VALUE_OF_WORD)
    return tuple(sorted(words | {"top", "bottom", "left", "right"}))


def scenes_of(split: Split) -> tuple[Scene, ...]:
    """All scenes of a split, in a fixed and well shuffled order.

    About one combination in ten is kept for ``test``: no drawing of it is ever shown to the pipeline or the judges.
    Both the split and the order come from a hash of the caption, hence do not depend on platform or Python version.
    """
    return tuple(_described(split).values())


def prompts(split: Split) -> list[str]:
    """Dense captions of all scenes of a split; the first N are as diverse as a random sample."""
    return list(_described(split))


def _described(split: Split) -> dict[str, Scene]:
    """The scenes of a split by their captions, in their order."""
    if split not in _splits():
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    return _splits()[split]


@functools.cache
def _splits() -> dict[Split, dict[str, Scene]]:
    described: dict[Split, list[tuple[bytes, str, Scene]]] = {"train": [], "test": []}
    for values in itertools.product(*ATTRIBUTES.values()):
        scene = Scene(*values)
        caption = scene.caption()
        digest = hashlib.sha256(caption.encode()).digest()
        is_test = int.from_bytes(digest[:4], "big") < _TEST_SHARE * 2**32
        described["test" if is_test else "train"].append((digest[4:], caption, scene))
    return {
        split: {caption: scene for _, caption, scene in sorted(of_split, key=lambda known: known[0])}
        for split, of_split in described.items()
    }


def _check_value(attribute: str, value: str) -> None:
    if attribute not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {attribute!r}; tiny-shapes knows: {', '.join(ATTRIBUTES)}")
    if value not in ATTRIBUTES[attribute]:
        raise ValueError(f"{attribute} cannot be {value!r}; it is one of: {', '.join(ATTRIBUTES[attribute])}")
