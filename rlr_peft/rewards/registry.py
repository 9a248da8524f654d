"""From the text of `--reward_fn` to a reward."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rlr_peft.redaction import is_address
from rlr_peft.rewards.base import Reward, RewardError
from rlr_peft.rewards.callables import load_callable_reward
from rlr_peft.rewards.embedded import SPEC_OF_JUDGE, JpegReward, TinyShapesJudgeReward
from rlr_peft.rewards.model_reward import ModelSettings
from rlr_peft.rewards.remote import RemoteReward, RemoteSettings
from rlr_peft.rewards.video import TemporalFlicker
from rlr_peft.tiny_shapes.scenes import ATTRIBUTES

OWN_FORMS = "`package.module:callable`, `path/to/file.py:callable` or `http(s)://host:port/`"


@dataclass(frozen=True)
class RewardSettings:
    """How rewards are loaded.

    Attributes:
        model: how the networks of the built-in rewards are held, and where they run.
        remote: how reward servers are asked.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    remote: RemoteSettings = field(default_factory=RemoteSettings)


def _aesthetic(settings: ModelSettings) -> Reward:
    from rlr_peft.rewards.clip_rewards import Aesthetic

    return Aesthetic(settings)


def _clipscore(settings: ModelSettings) -> Reward:
    from rlr_peft.rewards.clip_rewards import ClipScore

    return ClipScore(settings)


def _pickscore(settings: ModelSettings) -> Reward:
    from rlr_peft.rewards.clip_rewards import PickScore

    return PickScore(settings)


def _hpsv2_0(settings: ModelSettings) -> Reward:
    from rlr_peft.rewards.clip_rewards import HPSv2

    return HPSv2("v2.0", settings)


def _hpsv2_1(settings: ModelSettings) -> Reward:
    from rlr_peft.rewards.clip_rewards import HPSv2

    return HPSv2("v2.1", settings)


def _imagereward(settings: ModelSettings) -> Reward:
    from rlr_peft.rewards.image_reward import ImageReward

    return ImageReward(settings)


def _subject_consistency(settings: ModelSettings) -> Reward:
    from rlr_peft.rewards.video import SubjectConsistency

    return SubjectConsistency(settings)


# transformers is imported only by the rewards that need it: it takes seconds.
MODEL_REWARDS: dict[str, Callable[[ModelSettings], Reward]] = {
    "aesthetic": _aesthetic,
    "clipscore": _clipscore,
    "hpsv2": _hpsv2_1,
    "hpsv2/v2.0": _hpsv2_0,
    "hpsv2/v2.1": _hpsv2_1,
    "imagereward": _imagereward,
    "pickscore": _pickscore,
    "subject-consistency": _subject_consistency,
}

PLAIN_REWARDS: dict[str, Callable[[], Reward]] = {
    "jpeg-compressibility": lambda: JpegReward(compressible=True),
    "jpeg-incompressibility": lambda: JpegReward(compressible=False),
    "temporal-flicker": TemporalFlicker,
}


def available_rewards() -> list[str]:
    """Every registered name; besides these, `load_reward` takes user callables and servers."""
    judged = [f"{spec}{suffix}" for spec in SPEC_OF_JUDGE.values() for suffix in ("", *(f"/{a}" for a in ATTRIBUTES))]
    return [*sorted([*MODEL_REWARDS, *PLAIN_REWARDS]), *judged]


def load_reward(spec: str, device: str | torch.device = "cpu", settings: RewardSettings | None = None) -> Reward:
    """Load a reward.

    Args:
        spec: one of `available_rewards()`, `package.module:callable`, `path/to/file.py:callable`, or an http(s) URL.
        device: where a judge or a user's module runs, when no settings are given also the built-in networks.
        settings: how networks are held and servers are asked.

    Raises:
        RewardError: unknown name (the nearest ones are suggested), missing files, or a callable that cannot be loaded.
    """
    settings = settings or RewardSettings(ModelSettings(torch.device(device)))
    if spec in PLAIN_REWARDS:
        return PLAIN_REWARDS[spec]()
    if spec in MODEL_REWARDS:
        return MODEL_REWARDS[spec](settings.model)
    base, _, attribute = spec.partition("/")
    for judge, judge_spec in SPEC_OF_JUDGE.items():
        if spec == judge_spec or (base == judge_spec and attribute in ATTRIBUTES):
            return TinyShapesJudgeReward(judge, attribute or None, device)
    if is_address(spec):
        return RemoteReward(spec, settings.remote)
    if ":" in spec:
        return load_callable_reward(spec, device)
    raise RewardError(_unknown(spec))


def _unknown(spec: str) -> str:
    known = available_rewards()
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    if spec.endswith(".py"):
        hint = f" To use a function in this file, name it: `{spec}:callable`."
    return f"unknown reward '{spec}'.{hint} There are: {', '.join(known)}; or your own as {OWN_FORMS}"
