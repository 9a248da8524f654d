"""From the text of `--reward_fn` to a reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from rlr_peft.config.reward import VLM_PREFIX, unknown_reward
from rlr_peft.errors import RewardError
from rlr_peft.redaction import is_address
from rlr_peft.rewards.base import Reward
from rlr_peft.rewards.callables import load_callable_reward
from rlr_peft.rewards.embedded import SPEC_OF_JUDGE, JpegReward, TinyShapesJudgeReward
from rlr_peft.rewards.model_reward import ModelSettings
from rlr_peft.rewards.ocr import OcrReward
from rlr_peft.rewards.questions import JudgeSettings
from rlr_peft.rewards.remote import RemoteReward, RemoteSettings
from rlr_peft.rewards.video import TemporalFlicker
from rlr_peft.rewards.vlm_endpoint import VlmEndpoint
from rlr_peft.tiny_shapes.judges import JudgeName
from rlr_peft.tiny_shapes.scenes import ATTRIBUTES


@dataclass(frozen=True)
class RewardSettings:
    """How rewards are loaded.

    Attributes:
        model: how the networks of the built-in rewards are held, and where they run.
        remote: how reward servers are asked.
        judge: what vision-language models are asked, and where they are.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    remote: RemoteSettings = field(default_factory=RemoteSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)


def _from(module: str, name: str, *arguments: Any) -> Callable[[ModelSettings], Reward]:
    """Imports the module when the reward is loaded: transformers takes seconds."""

    def load(settings: ModelSettings) -> Reward:
        return getattr(import_module(f"rlr_peft.rewards.{module}"), name)(*arguments, settings)

    return load


def _judge(judge: JudgeName, attribute: str | None) -> Callable[[ModelSettings], Reward]:
    return lambda settings: TinyShapesJudgeReward(judge, attribute, settings.device)


MODEL_REWARDS: dict[str, Callable[[ModelSettings], Reward]] = {
    "aesthetic": _from("clip_rewards", "Aesthetic"),
    "aesthetic-v2.5": _from("siglip_rewards", "AestheticV25"),
    "clipscore": _from("clip_rewards", "ClipScore"),
    "hpsv2": _from("clip_rewards", "HPSv2", "v2.1"),
    "hpsv2/v2.0": _from("clip_rewards", "HPSv2", "v2.0"),
    "hpsv2/v2.1": _from("clip_rewards", "HPSv2", "v2.1"),
    "imagereward": _from("image_reward", "ImageReward"),
    "pickscore": _from("clip_rewards", "PickScore"),
    "subject-consistency": _from("video", "SubjectConsistency"),
}
LARGE_REWARDS: dict[str, Callable[[ModelSettings], Reward]] = {
    "detector": _from("detector", "Detector"),
    "hpsv3": _from("hpsv3", "HPSv3"),
}
BUILT_IN: dict[str, Callable[[ModelSettings], Reward]] = {
    **MODEL_REWARDS,
    **LARGE_REWARDS,
    "ocr": lambda settings: OcrReward(),
    "jpeg-compressibility": lambda settings: JpegReward(compressible=True),
    "jpeg-incompressibility": lambda settings: JpegReward(compressible=False),
    "temporal-flicker": lambda settings: TemporalFlicker(),
}
WRITING_REWARDS = {"unifiedreward": lambda settings: _unified(settings)}
JUDGES = {
    spec + (f"/{attribute}" if attribute else ""): _judge(judge, attribute)
    for judge, spec in SPEC_OF_JUDGE.items()
    for attribute in (None, *ATTRIBUTES)
}


def available_rewards() -> list[str]:
    """Every registered name; besides these, `load_reward` takes judges, user callables and servers."""
    return [*sorted(BUILT_IN | WRITING_REWARDS), *JUDGES]


def load_reward(spec: str, settings: RewardSettings | None = None) -> Reward:
    """Load a reward.

    Args:
        spec: one of `available_rewards()`, `vlm:MODEL`, `package.module:callable`, `path/to/file.py:callable`, or an
            http(s) URL.
        settings: how networks are held and where they run (a user's module too), and how servers are asked.

    Raises:
        RewardError: unknown name (the nearest ones are suggested), missing files, or a callable that cannot be loaded.
    """
    settings = settings or RewardSettings()
    built_in = (BUILT_IN | JUDGES).get(spec)
    if built_in is not None:
        return built_in(settings.model)
    if spec in WRITING_REWARDS:
        return WRITING_REWARDS[spec](settings)
    if is_address(spec):
        return RemoteReward(spec, settings.remote)
    if spec.startswith(VLM_PREFIX):
        return _vlm(spec.removeprefix(VLM_PREFIX), settings)
    if ":" in spec:
        return load_callable_reward(spec, settings.model.device)
    raise RewardError(unknown_reward(spec, available_rewards()))


def _vlm(model: str, settings: RewardSettings) -> Reward:
    if settings.judge.endpoint is not None:
        return VlmEndpoint(model, settings.judge, settings.remote)
    judge: Callable[..., Reward] = import_module("rlr_peft.rewards.vlm").VlmJudge
    return judge(model, settings.judge, settings.model)


def _unified(settings: RewardSettings) -> Reward:
    module = import_module("rlr_peft.rewards.unified_reward")
    if settings.judge.endpoint is not None:
        reward: Reward = module.UnifiedRewardEndpoint(settings.judge.endpoint, settings.model.files, settings.remote)
    else:
        reward = module.UnifiedReward(settings.model)
    return reward
