"""A prompt, what belongs to it, and the stages of a Diffusive Chain-of-Thought, each with a prompt of its own.

Source of the stages: the section on Diffusive Chain-of-Thought of arXiv:2502.00639. Early steps lay out the image, late
ones draw its details, so a prompt is told from coarse to fine.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from rlr_peft.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_NAMES = ("coarse", "mid", "fine")
"""Of stages."""


class PromptError(UserError, ValueError):
    """Prompts could not be read or split into stages; the message says what was expected, found, and what to do."""


@dataclass(frozen=True)
class ConditionImage:
    """A picture that a sample is drawn from besides its text.

    Attributes:
        path: of its file; empty where there are only its bytes.
        data: the bytes of the file; None where there is a path.
    """

    path: str = ""
    data: bytes | None = field(default=None, repr=False)

    def fitted(self, width: int, height: int, area: int | None = None) -> "Image.Image":
        """In RGB, cut to this aspect ratio about its middle, and scaled to this size in pixels; not to be changed.

        Args:
            width, height: of the picture, in pixels.
            area: about so many pixels at the same aspect ratio in place of this size, in sides of 32, 64, ... pixels as
                Qwen-Image-Edit has them.

        Raises:
            PromptError: no picture that can be read.
        """
        if area is not None:
            scale = math.sqrt(area / (width * height)) / 32
            width, height = 32 * round(scale * width), 32 * round(scale * height)
        return _fitted(self, width, height)


@lru_cache(maxsize=64)
def _fitted(image: ConditionImage, width: int, height: int) -> "Image.Image":
    from PIL import Image, ImageOps  # a `--help` needs none

    try:
        with Image.open(image.path if image.data is None else io.BytesIO(image.data)) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise PromptError(f"condition image {image.path or 'of the data'}: cannot be read: {error}") from None
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Prompt:
    """What a sample is drawn from, and what its source says besides.

    Attributes:
        text: what is drawn; ``str(prompt)`` gives it too.
        negative_prompt: what guidance steers away from for this prompt; None leaves it to the chain.
        stages: the prompt of every stage of a Diffusive Chain-of-Thought, noise first; empty for the same in all.
        metadata: what rewards are told besides the text; read-only.
        image: what the sample is drawn from besides the text, by pipelines that edit or animate a picture; None for
            none.
    """

    text: str
    negative_prompt: str | None = None
    stages: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    image: ConditionImage | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[Any, ...]:
        return Prompt, (self.text, self.negative_prompt, self.stages, dict(self.metadata), self.image)


PromptLike: TypeAlias = Prompt | str
"""A prompt, or the text of one that has nothing besides."""


def as_prompt(given: PromptLike) -> Prompt:
    """The prompt itself, or one of a plain text."""
    return given if isinstance(given, Prompt) else Prompt(given)


def as_prompts(given: Iterable[PromptLike]) -> list[Prompt]:
    """All of them as prompts."""
    return [as_prompt(one) for one in given]


def texts_of(prompts: Iterable[PromptLike]) -> list[str]:
    """What is drawn, without the rest."""
    return [str(prompt) for prompt in prompts]


@dataclass(frozen=True)
class Stages:
    """Names and shares of the stages, noise first.

    Attributes:
        names: one per stage, all different.
        fractions: share of the T steps that each stage takes; they sum to 1.
    """

    names: tuple[str, ...]
    fractions: tuple[float, ...]

    def __post_init__(self) -> None:
        names, fractions = self.names, self.fractions
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected different names of the stages, got {', '.join(names) or 'none'}")
        if len(fractions) != len(names):
            raise ValueError(f"expected one fraction for each of the stages {', '.join(names)}, got {len(fractions)}")
        if not all(fraction > 0 for fraction in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-3):
            raise ValueError(f"expected fractions above 0 that sum to 1, got {' '.join(map(str, fractions))}")

    @property
    def count(self) -> int:
        """Number of stages."""
        return len(self.names)

    def steps(self, num_steps: int) -> tuple[range, ...]:
        """The steps t of every stage in the order in which the chain takes them, T first and 1 last.

        Args:
            num_steps: T. The ends of the stages are rounded to whole steps.

        Raises:
            ValueError: a stage gets no step.
        """
        # Halves always up, where `round` would go to the even neighbour and could leave a stage of one step none.
        ends = [math.floor(num_steps * sum(self.fractions[: i + 1]) + 0.5 + 1e-9) for i in range(self.count)]
        ends[-1] = num_steps
        starts = [0, *ends[:-1]]
        for name, start, end in zip(self.names, starts, ends, strict=True):
            if start >= end:
                raise ValueError(
                    f"expected at least one of the {num_steps} steps for every stage, got none for {name} with "
                    f"fractions {' '.join(f'{fraction:g}' for fraction in self.fractions)}"
                )
        return tuple(range(num_steps - start, num_steps - end, -1) for start, end in zip(starts, ends, strict=True))

    def window(self, name: str, num_steps: int) -> tuple[int, int]:
        """First and last step t, counted from the clean end, of a stage.

        Raises:
            ValueError: no such stage.
        """
        if name not in self.names:
            raise ValueError(f"expected a stage of {', '.join(self.names)}, got {name}")
        steps = self.steps(num_steps)[self.names.index(name)]
        return steps[-1], steps[0]

    def describe(self, num_steps: int) -> str:
        """`coarse (steps 50-34), mid (33-18), fine (17-1)`."""
        spans = [f"{steps[0]}-{steps[-1]}" for steps in self.steps(num_steps)]
        spans[0] = f"steps {spans[0]}"
        return ", ".join(f"{name} ({span})" for name, span in zip(self.names, spans, strict=True))


def make_stages(names: Sequence[str] | None = None, fractions: Sequence[float] | None = None) -> Stages:
    """Stages with the usual defaults.

    Args:
        names: None stands for coarse, mid, fine, or for stage-1, stage-2, ... where the fractions are not three.
        fractions: None stands for equal parts.

    Raises:
        ValueError: names and fractions that do not fit each other.
    """
    if names is None:
        count = len(DEFAULT_NAMES) if fractions is None else len(fractions)
        names = DEFAULT_NAMES if count == len(DEFAULT_NAMES) else tuple(f"stage-{i + 1}" for i in range(count))
    shares = tuple(1 / len(names) for _ in names) if fractions is None else tuple(fractions)
    return Stages(tuple(names), shares)
