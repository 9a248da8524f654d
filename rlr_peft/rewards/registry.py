"""From the text of `--reward_fn` to a reward."""

from __future__ import annotations

import difflib

import torch

from rlr_peft.rewards.base import Reward, RewardError
from rlr_peft.rewards.callables import load_callable_reward
from rlr_peft.rewards.compression import JpegReward
from rlr_peft.rewards.tiny_shapes_judge import SPEC_OF_JUDGE, TinyShapesJudgeReward
from rlr_peft.tiny_shapes.scenes import ATTRIBUTES

CALLABLE_FORMS = "`package.module:callable` or `path/to/file.py:callable`"


def available_rewards() -> list[str]:
    """Every registered name; besides these, `load_reward` takes user callables."""
    judged = [f"{spec}{suffix}" for spec in SPEC_OF_JUDGE.values() for suffix in ("", *(f"/{a}" for a in ATTRIBUTES))]
    return ["jpeg-compressibility", "jpeg-incompressibility", *judged]


def load_reward(spec: str, device: str | torch.device = "cpu") -> Reward:
    """Load a reward.

    Args:
        spec: one of `available_rewards()`, `package.module:callable` or `path/to/file.py:callable`.
        device: where its model, if it has one, runs.

    Raises:
        RewardError: unknown name (the nearest ones are suggested), or a callable that cannot be loaded.
    """
    if spec in ("jpeg-compressibility", "jpeg-incompressibility"):
        return JpegReward(compressible=spec == "jpeg-compressibility")
    base, _, attribute = spec.partition("/")
    for judge, judge_spec in SPEC_OF_JUDGE.items():
        if spec == judge_spec or (base == judge_spec and attribute in ATTRIBUTES):
            return TinyShapesJudgeReward(judge, attribute or None, device)
    if ":" in spec and "://" not in spec:
        return load_callable_reward(spec, device)
    raise RewardError(_unknown(spec))


def _unknown(spec: str) -> str:
    known = available_rewards()
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    if spec.endswith(".py"):
        hint = f" To use a function in this file, name it: `{spec}:callable`."
    return f"unknown reward '{spec}'.{hint} There are: {', '.join(known)}; or your own as {CALLABLE_FORMS}"
