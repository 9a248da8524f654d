"""Knobs of the reward."""

from dataclasses import MISSING, dataclass
from typing import Literal

from rlr_peft.config.knob import knob


@dataclass(frozen=True)
class RewardArguments:
    """Reward: what the adapter is trained to raise"""

    reward_fn: dict[str, float] | str = knob(
        MISSING,
        "Reward: a registered name, `package.module:callable`, `file.py:callable` or http(s) URL; or several and their "
        "weights, `{NAME: WEIGHT, ...}`.",
        found="reward",
    )
    heldout_reward_fn: tuple[str, ...] | None = knob(
        None,
        "One or more rewards that are only ever measured, never trained on: they expose reward hacking. Early stopping "
        "watches the first.",
        found="reward",
    )
    reward_scaling: Literal["running", "first", "none"] = knob(
        "running",
        "What each of several rewards is divided by: its standard deviation over past updates, that of images of the "
        "base, or nothing.",
    )
    reward_minimum: dict[str, float] | None = knob(
        None,
        "Hard minimums of rewards of reward_fn, `{NAME: MINIMUM, ...}`, in the rewards' own units.",
        found="reward",
    )
    reward_minimum_penalty: float = knob(
        10.0,
        "What a reward below its minimum costs for every standard deviation that it lacks.",
        unit="standard deviations of reward",
        above=0,
        at_most=1e6,
    )
    reward_dtype: Literal["fp32", "fp16", "bf16"] = knob(
        "fp32", "Number format of the weights of built-in reward models."
    )
    offload_rewards: bool = knob(
        False, "Keep built-in reward models in CPU memory between uses: less GPU memory, more time."
    )
    reward_model_path: dict[str, str] | None = knob(
        None,
        "Local copies of reward models, `{REPOSITORY: PATH, ...}`: a folder or file that stands for a Hub repository.",
    )
    reward_server_timeout: float = knob(
        120.0,
        "How long one try with a reward server may take, up to its answer's last byte, before it is asked again.",
        unit="seconds",
        above=0,
        at_most=86400,
    )
    reward_server_retries: int = knob(
        5,
        "Further tries when a reward server does not answer, or answers 429 or 5xx.",
        unit="tries",
        at_least=0,
        at_most=1000,
    )
    reward_server_batch_size: int = knob(
        16, "Images sent to a reward server at once.", unit="images", at_least=1, at_most=4096
    )
    decode_batch_size: int | None = knob(
        None,
        "Images decoded and scored on the tape at once; null means train_batch_size.",
        unit="images",
        at_least=1,
        at_most=4096,
    )
    decoded_frames: int | None = knob(
        None,
        "Train on the first so many frames of a video alone, for the decoder's memory; null decodes all.",
        unit="frames",
        at_least=1,
        at_most=10_000,
    )
