"""From the text of `--reward_fn` to a reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from rlr_peft.config.reward import OCR_PREFIX, VLM_PREFIX
from rlr_peft.errors import RewardError
from rlr_peft.redaction import is_address
from rlr_peft.rewards.base import Reward
from rlr_peft.rewards.callables import load_callable_reward
from rlr_peft.rewards.embedded import TinyShapesJudgeReward
from rlr_peft.rewards.model_reward import ModelSettings
from rlr_peft.rewards.names import (
    JUDGES,
    LARGE_REWARDS,
    MODEL_REWARDS,
    PLAIN_REWARDS,
    UNIFIED_REWARD,
    available_rewards,
    unknown_reward,
)
from rlr_peft.rewards.remote import RemoteReward, RemoteSettings
from rlr_peft.rewards.vlm_endpoint import JudgeSettings, VlmEndpoint


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


def load_reward(spec: str, settings: RewardSettings | None = None) -> Reward:
    """Load a reward.

    Args:
        spec: one of `available_rewards()`, `vlm:MODEL`, `ocr:MODEL`, `package.module:callable`,
            `path/to/file.py:callable`, or an http(s) URL.
        settings: how networks are held and where they run (a user's module too), and how servers are asked.

    Raises:
        RewardError: unknown name (the nearest ones are suggested), missing files, or a callable that cannot be loaded.
    """
    settings = settings or RewardSettings()
    if spec in JUDGES:
        judge, attribute = JUDGES[spec]
        return TinyShapesJudgeReward(judge, attribute, settings.model.device)
    if spec in PLAIN_REWARDS:
        return _load(*PLAIN_REWARDS[spec])
    if spec in MODEL_REWARDS or spec in LARGE_REWARDS:
        return _load(*(MODEL_REWARDS | LARGE_REWARDS)[spec], settings.model)
    if spec == UNIFIED_REWARD:
        return _unified(settings)
    if is_address(spec):
        return RemoteReward(spec, settings.remote)
    if spec.startswith(VLM_PREFIX):
        return _vlm(spec.removeprefix(VLM_PREFIX), settings)
    if spec.startswith(OCR_PREFIX):
        return _load("ocr", "OcrModel", spec.removeprefix(OCR_PREFIX), settings.model)
    if ":" in spec:
        return load_callable_reward(spec, settings.model.device)
    raise RewardError(unknown_reward(spec, available_rewards()))


def _load(module: str, name: str, *arguments: Any) -> Reward:
    """Imports the module only now: transformers takes seconds."""
    reward: Reward = getattr(import_module(f"rlr_peft.rewards.{module}"), name)(*arguments)
    return reward


def _vlm(model: str, settings: RewardSettings) -> Reward:
    if settings.judge.endpoint is not None:
        return VlmEndpoint(model, settings.judge, settings.remote)
    judge: Callable[..., Reward] = import_module("rlr_peft.rewards.vlm").VlmJudge
    return judge(model, settings.judge, settings.model)


def _unified(settings: RewardSettings) -> Reward:
    module = import_module("rlr_peft.rewards.vlm")
    if settings.judge.endpoint is not None:
        reward: Reward = module.UnifiedRewardEndpoint(settings.judge.endpoint, settings.model.files, settings.remote)
    else:
        reward = module.UnifiedReward(settings.model)
    return reward
