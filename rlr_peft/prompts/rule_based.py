"""Splits a prompt into coarse, mid and fine by rules: no language model, the same answer every time.

Captions of tiny-shapes are split exactly, by the scale of every attribute. Of any other text the subject stays in every
stage, and its phrases are sorted by the words in them; it is a rough sort, and the file of stage prompts can be edited.

Stages add to what was told before and take nothing back: guidance that stops naming what is drawn already lets it fade
(``benchmarks/dcot.py`` measures it).
"""

import re
from collections.abc import Callable, Sequence

from rlr_peft.tiny_shapes import scenes

SCALES = ("coarse", "mid", "fine")

_COARSE_WORDS = frozenset(
    "background foreground left right top bottom center centre middle above below behind beside near far sky landscape "
    "scene view field forest beach city street room indoors outdoors mountain mountains sea ocean desert garden "
    "horizon "
    "composition wide panorama aerial night day sunset sunrise dawn dusk winter summer snow rain fog".split()
)
_FINE_WORDS = frozenset(
    "detail details detailed intricate texture textured pattern patterned striped stripes dotted dots checkered fur "
    "feathers scales hair skin eyes hands fingers freckles wrinkles outline outlined engraved embroidered glossy matte "
    "shiny metallic rough smooth sharp focus crisp photorealistic realistic 4k 8k hd quality bokeh grain brushstrokes "
    "style render rendered painting watercolor oil sketch".split()
)
# A phrase starts at a comma, or at a word that tells where, with what or in which style.
_PHRASE_STARTS = re.compile(
    r"\s*[,;]\s*|\s+(?=(?:on|in|at|under|behind|beside|near|above|below|against|with|wearing|holding|covered)\s)"
)


def decompose_by_rules(prompt: str) -> tuple[str, str, str]:
    """The coarse, mid and fine prompt of a text: each adds what belongs to its scale, so that fine is the whole text.

    A stage to which nothing belongs yet gets the whole text as well.
    """
    try:
        attributes = scenes.parse_caption(prompt)
    except ValueError:
        subject, *phrases = [phrase for phrase in _PHRASE_STARTS.split(prompt) if phrase]
        scales = [_scale(phrase) for phrase in phrases]
        return _growing(prompt, phrases, scales, lambda chosen: ", ".join([subject, *chosen]))
    scales = [scenes.SCALES[name] for name in attributes]
    return _growing(prompt, list(attributes), scales, lambda names: scenes.describe({n: attributes[n] for n in names}))


def _growing(
    prompt: str, parts: Sequence[str], scales: Sequence[str], describe: Callable[[list[str]], str]
) -> tuple[str, str, str]:
    texts = []
    for i in range(len(SCALES)):
        chosen = [part for part, scale in zip(parts, scales, strict=True) if scale in SCALES[: i + 1]]
        texts.append(describe(chosen) if 0 < len(chosen) < len(parts) else str(prompt))
    return texts[0], texts[1], texts[2]


def _scale(phrase: str) -> str:
    words = set(re.findall(r"\w+", phrase.lower()))
    fine, coarse = len(words & _FINE_WORDS), len(words & _COARSE_WORDS)
    if fine > coarse:
        return "fine"
    return "coarse" if coarse else "mid"
