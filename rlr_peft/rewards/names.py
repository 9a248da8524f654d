"""Registered rewards by name: known without torch, so that a typing error is told at once.

A reward of this package is a class and a line in one of these tables: its module in `rlr_peft.rewards`, the class, and
what it is called with before the settings.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rlr_peft.config import ConfigError
from rlr_peft.config.reward import OCR_PREFIX, model_in
from rlr_peft.tiny_shapes import ATTRIBUTES

MODEL_REWARDS: dict[str, tuple[Any, ...]] = {
    "aesthetic": ("clip_rewards", "Aesthetic"),
    "aesthetic-v2.5": ("clip_rewards", "AestheticV25"),
    "clipscore": ("clip_rewards", "ClipScore"),
    "hpsv2": ("clip_rewards", "HPSv2", "v2.1"),
    "hpsv2/v2.0": ("clip_rewards", "HPSv2", "v2.0"),
    "hpsv2/v2.1": ("clip_rewards", "HPSv2", "v2.1"),
    "imagereward": ("preference_rewards", "ImageReward"),
    "pickscore": ("clip_rewards", "PickScore"),
    "subject-consistency": ("video_rewards", "SubjectConsistency"),
}
LARGE_REWARDS: dict[str, tuple[Any, ...]] = {
    "detector": ("detector", "Detector"),
    "hpsv3": ("preference_rewards", "HPSv3"),
    "videoreward": ("video_rewards", "VideoReward"),
}
"""Called with the settings of their networks, as those before."""
PLAIN_REWARDS: dict[str, tuple[Any, ...]] = {
    "ocr": ("ocr", "OcrReward"),
    "jpeg-compressibility": ("embedded", "JpegReward", True),
    "jpeg-incompressibility": ("embedded", "JpegReward", False),
    "temporal-flicker": ("video_rewards", "TemporalFlicker"),
}
"""Called without settings."""
UNIFIED_REWARD = "unifiedreward"
SPEC_OF_JUDGE: dict[Literal["reward", "heldout"], str] = {"reward": "tiny-shapes", "heldout": "tiny-shapes-heldout"}
JUDGES = {
    spec + (f"/{attribute}" if attribute else ""): (judge, attribute)
    for judge, spec in SPEC_OF_JUDGE.items()
    for attribute in (None, *ATTRIBUTES)
}
"""The embedded judges, of all attributes or of one."""
BLACK_BOXES = frozenset({"detector", UNIFIED_REWARD, *PLAIN_REWARDS} - {"temporal-flicker"})
"""Registered ones without a gradient."""
OWN_FORMS = "`vlm:MODEL`, `ocr:MODEL`, `package.module:callable`, `path/to/file.py:callable` or `http(s)://host:port/`"


def available_rewards() -> list[str]:
    """Every registered name; besides these, `load_reward` takes judges, user callables and servers."""
    return [*sorted([*MODEL_REWARDS, *LARGE_REWARDS, *PLAIN_REWARDS, UNIFIED_REWARD]), *JUDGES]


def unknown_reward(spec: str, known: Sequence[str]) -> str:
    """What to say of a reward that is not among the known ones."""
    near = difflib.get_close_matches(spec, known, n=1, cutoff=0.7)
    module, _, attribute = spec.rpartition(".")
    hint = f" Did you mean '{near[0]}'?" if near else ""
    if spec.endswith(".py"):
        hint = f" To use a function in this file, name it: `{spec}:callable`."
    elif "," in spec:
        hint = " Write several with a space between them, or with weights as `{NAME: 1, NAME: 1}`."
    elif module.isidentifier() and not near:
        hint = f" To use a function of a module, write a colon before it: `{module}:{attribute}`."
    return f"unknown reward '{spec}'.{hint} There are: {', '.join(known)}; or your own as {OWN_FORMS}"


def refuse_unknown(specs: Iterable[str]) -> None:
    """Raises ConfigError for the first that is neither registered nor of a form of people's own."""
    known = available_rewards()
    for spec in specs:
        if model_in(spec) == "":
            raise ConfigError(f"reward '{spec}': expected a Hub id or a folder behind the colon, got none")
        name, _, behind = spec.partition(":")
        if behind and name in known and name != OCR_PREFIX[:-1]:
            raise ConfigError(f"reward '{spec}': a weight is written as --reward_fn '{{{name}: {behind}}}'")
        if ":" not in spec and spec not in known:
            raise ConfigError(unknown_reward(spec, known))
