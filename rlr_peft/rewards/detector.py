"""Do the objects of a prompt stand in the image, as many, in the colours and at the places that its metadata tell?

The metadata have the shape of GenEval's (Ghosh et al., 2023), and so have the rules. Its detector and its classifier of
colours have other weights (Mask2Former of mmdetection, CLIP on masks), so that scores do not compare with GenEval's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer, Owlv2ForObjectDetection, Owlv2Processor

from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, loading, unit
from rlr_peft.rewards.preprocessing import clip_pixels, to_8_bit
from rlr_peft.rewards.scores import describe_samples

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
THRESHOLD = 0.2  # of a detection's score
MOST_OVERLAP = 0.5  # of two boxes of a class, intersection over union; the worse of two that overlap more is dropped
MOST_OBJECTS = 16  # of a class
SLACK = 0.1  # of the sum of two boxes' sides, within which they count as standing at the same place

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Requirement:
    """A clause of the metadata.

    Attributes:
        name: of the class of objects.
        count: at least so many are wanted; of an excluded class, fewer.
        color: of `COLORS`, of that many of them; None for any.
        position: a key of `DIRECTIONS` and the place in the list of the requirement whose objects it is seen from.
    """

    name: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None


class Detector(ModelReward):
    """The share of the clauses that are fulfilled, in [0, 1], and as info `correct`: 1 where all of them are.

    A colour and a place are clauses of their own. Detections are OWLv2's; colours are CLIP's, on their boxes.
    """

    def __init__(self, settings: ModelSettings) -> None:
        folder, clip = settings.files.of("detector")
        with loading("detector", folder):
            network = Owlv2ForObjectDetection.from_pretrained(folder, dtype=settings.dtype)
            pixels, words = AutoImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
            self._processor = Owlv2Processor(pixels, words)
        with loading("detector", clip):
            colors = CLIPModel.from_pretrained(clip, dtype=settings.dtype)
            self._tokenizer = CLIPTokenizer.from_pretrained(clip)
        super().__init__("detector", settings, nn.ModuleDict({"detector": network, "colors": colors}))
        self.differentiable = False

    def check_prompts(self, prompts: list[str], metadata: Metadata) -> None:
        """Refuses those whose metadata require nothing, or in another form."""
        self._requirements(prompts, metadata)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) float32 in [0, 1]."""
        rows = []
        for image, (included, excluded) in zip(images, self._requirements(prompts, metadata), strict=True):
            objects = self.find(image, [one.name for one in (*included, *excluded)])
            color_of = partial(self.color, image)
            rows.append(list(fulfilled(objects, included, excluded, color_of)))
        scores = torch.tensor([sum(row) / len(row) for row in rows])
        return scores, {"correct": torch.tensor([float(all(row)) for row in rows])}

    def find(self, image: Tensor, names: list[str]) -> dict[str, list[Box]]:
        """The boxes of every class in an image (3, H, W), the surest first."""
        labels = list(dict.fromkeys(names))
        picture = Image.fromarray(to_8_bit(image))
        texts = [[f"a photo of a {name}" for name in labels]]
        inputs = self._processor(text=texts, images=picture, return_tensors="pt").to(image.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.network["detector"].dtype)
        (found,) = self._processor.post_process_grounded_object_detection(
            self.network["detector"](**inputs),
            threshold=THRESHOLD,
            target_sizes=[(picture.height, picture.width)],
            text_labels=[labels],
        )
        objects: dict[str, list[Box]] = {name: [] for name in labels}
        for place in found["scores"].argsort(descending=True).tolist():
            boxes = objects[found["text_labels"][place]]
            box = tuple(found["boxes"][place].tolist())
            if len(boxes) < MOST_OBJECTS and all(overlap(box, other) <= MOST_OVERLAP for other in boxes):
                boxes.append(box)
        return objects

    def color(self, image: Tensor, name: str, box: Box) -> str:
        """What of `COLORS` a box of an image (3, H, W) shows most likely, if it holds an object of this class."""
        return COLORS[int(self.color_cosines(image, name, box).argmax())]

    def color_cosines(self, image: Tensor, name: str, box: Box) -> Tensor:
        """How much a box of an image (3, H, W) is like each of `COLORS`, (colours,)."""
        height, width = image.shape[1:]
        left, top = (int(min(max(side, 0), most - 1)) for side, most in zip(box[:2], (width, height)))
        part = image[None, :, top : max(top + 1, round(box[3])), left : max(left + 1, round(box[2]))]
        clip = self.network["colors"]
        texts = [text.format(color=color, name=name) for color in COLORS for text in COLOR_TEXTS]
        ids = self._tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(image.device)
        pixels = clip_pixels(part, clip.config.vision_config.image_size).to(clip.dtype)
        seen = unit(clip.get_image_features(pixel_values=pixels).pooler_output)
        read = unit(clip.get_text_features(input_ids=ids).pooler_output)
        directions = unit(read.unflatten(0, (len(COLORS), -1)).mean(1))
        return directions @ seen[0]

    def _requirements(
        self, prompts: list[str], metadata: Metadata
    ) -> list[tuple[list[Requirement], list[Requirement]]]:
        return [read_requirements(entry, describe_samples([index], prompts)) for index, entry in enumerate(metadata)]


def read_requirements(entry: Mapping[str, Any], sample: str) -> tuple[list[Requirement], list[Requirement]]:
    """What must be in the image, and what must not, of metadata of GenEval's shape.

    Args:
        entry: `include`, and `exclude` if there is any: lists of `{class, count, color, position}`.
        sample: for errors.

    Raises:
        RewardError: another shape.
    """
    try:
        included, excluded = (
            [
                Requirement(
                    str(clause["class"]),
                    int(clause.get("count", 1)),
                    clause.get("color"),
                    None if clause.get("position") is None else (clause["position"][0], int(clause["position"][1])),
                )
                for clause in entry.get(kind) or []
            ]
            for kind in ("include", "exclude")
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        included = []
    colors = {one.color for one in included} - {None, *COLORS}
    places = [one.position for one in included]
    if not included or colors or any(p and (p[0] not in DIRECTIONS or p[1] >= i) for i, p in enumerate(places)):
        raise RewardError(
            "reward 'detector': expected `include` in the metadata, a list of {class, count, color, position} (colors: "
            f"{', '.join(COLORS)}; positions: [{' or '.join(DIRECTIONS)}, number of an earlier entry]), and `exclude` "
            f"likewise, got {entry.get('include')!r:.200} for {sample}; give --metadata_columns include exclude of "
            "GenEval's records"
        )
    return included, excluded


def fulfilled(
    objects: Mapping[str, list[Box]],
    included: list[Requirement],
    excluded: list[Requirement],
    color_of: Callable[[str, Box], str],
) -> Iterator[bool]:
    """Of every clause whether it is fulfilled; what is wanted of objects that are missing is not.

    Args:
        objects: the boxes of every class, the surest first; those beyond the count are not looked at.
        included, excluded: what must be in the image, and what must not.
        color_of: the colour of an object of a class in a box.
    """
    groups: list[list[Box] | None] = []
    for wanted in included:
        found = objects.get(wanted.name, [])[: wanted.count]
        enough = len(found) == wanted.count
        right = [enough]
        if wanted.color is not None:
            right.append(enough and all(color_of(wanted.name, box) == wanted.color for box in found))
        if wanted.position is not None:
            direction, number = wanted.position
            others = groups[number]
            right.append(
                enough and others is not None and all(lies(box, direction, other) for box in found for other in others)
            )
        yield from right
        groups.append(found if all(right) else None)
    for unwanted in excluded:
        yield len(objects.get(unwanted.name, [])) < unwanted.count


def lies(box: Box, direction: str, other: Box) -> bool:
    """Whether a box lies in a direction of another one, beyond `SLACK`, by the line between their centres."""
    offsets, beyond = [], []
    for axis in (0, 1):
        offset = (box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2
        sides = box[axis + 2] - box[axis] + other[axis + 2] - other[axis]
        offsets.append(offset)
        beyond.append(max(abs(offset) - SLACK * sides, 0.0) * (1 if offset > 0 else -1))
    length = (offsets[0] ** 2 + offsets[1] ** 2) ** 0.5
    along = sum(sign * part for sign, part in zip(DIRECTIONS[direction], beyond))
    return length > 0 and along / length > 0.5


def overlap(box: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((one[2] - one[0]) * (one[3] - one[1]) for one in (box, other))
    return shared / (areas - shared) if areas > shared else 0.0
