"""The named estimators: which terms each is made of, and what the config may change about it."""

import math
from dataclasses import dataclass
from typing import Literal

from rlr_peft.config import EstimatorArguments, window_steps
from rlr_peft.config.chain_of_thought import AUTO
from rlr_peft.estimators.base import Estimator
from rlr_peft.estimators.block_length import half_order_length_for_compute, half_order_length_for_memory
from rlr_peft.estimators.half_order import HalfOrder, StageWindow, StartSampler
from rlr_peft.estimators.pathwise import RewardFeedbackEstimator
from rlr_peft.estimators.policy import PolicyGradientEstimator, PolicyGradientSettings
from rlr_peft.estimators.preference import PreferenceEstimator, PreferenceSettings
from rlr_peft.estimators.rlr import Coefficients, RLREstimator, RLRSettings
from rlr_peft.estimators.zeroth_order import ZerothOrder
from rlr_peft.stages import Stages


@dataclass(frozen=True)
class Preset:
    """Defaults of one estimator of the RLR family; a config's explicit values replace them."""

    fo_steps: int | Literal["auto", "all"]
    ho_length: int | None
    ho_blocks: int | Literal["all"] = "all"
    ho_start: StartSampler = "uniform"
    zo: Literal["none", "one-point", "two-point"] = "none"
    black_box_steps: int | Literal["auto"] = 0


PRESETS = {
    # Our default: measured crossing of the per-step variances, single-step score terms beyond it.
    "rlr": Preset(fo_steps="auto", ho_length=1, black_box_steps="auto"),
    # The paper's form with its formula corrected: one FO step, one free block of length h, ZO on the complement.
    "rlr-paper": Preset(fo_steps=1, ho_length=2, ho_blocks=1, zo="two-point"),
    "full-bp": Preset(fo_steps="all", ho_length=None),
    "truncated-bp": Preset(fo_steps=1, ho_length=None),
    "reinforce": Preset(fo_steps=0, ho_length=1),
}


def build_estimator(arguments: EstimatorArguments, num_inference_steps: int, stages: Stages | None = None) -> Estimator:
    """The estimator that the config names; ``stages`` are those that ``ho_window`` may name.

    Raises:
        ValueError: a budget that does not allow a block of one step, or one that cannot decide the length.
    """
    name = arguments.estimator
    if name in PRESETS:
        return RLREstimator(settings_from_arguments(arguments, num_inference_steps, stages), arguments.antithetic)
    if name == "refl":
        return RewardFeedbackEstimator(arguments.fo_steps if isinstance(arguments.fo_steps, int) else None)
    steps = HalfOrder(
        length=1,
        blocks=_or(arguments.ho_blocks, "all"),
        start=_or(arguments.ho_start, "uniform"),
        window=_window(arguments, num_inference_steps, stages),
    )
    if name == "d3po":
        return PreferenceEstimator(PreferenceSettings(arguments.dpo_beta, steps, _or(arguments.inner_epochs, 1)))
    return PolicyGradientEstimator(
        PolicyGradientSettings(
            advantage="prompt-statistics" if name == "ddpo" else "group-normalized",
            steps=steps,
            inner_epochs=_or(arguments.inner_epochs, 2 if name == "ddpo" else 1),
            clip_range=arguments.clip_range,
            advantage_clip=arguments.advantage_clip,
            prompt_buffer_size=arguments.per_prompt_stat_tracking_buffer_size,
            prompt_min_count=arguments.per_prompt_stat_tracking_min_count,
        )
    )


def settings_from_arguments(
    arguments: EstimatorArguments, num_inference_steps: int, stages: Stages | None = None
) -> RLRSettings:
    """The terms of an estimator of the RLR family: the preset's, with the config's explicit values in their place.

    Raises:
        ValueError: a budget that does not allow a block of one step, or one that cannot decide the length.
    """
    preset = PRESETS[arguments.estimator]
    fo_steps = _or(arguments.fo_steps, preset.fo_steps)
    first_order_steps = num_inference_steps if fo_steps == "all" else fo_steps
    zo = _or(arguments.zo, preset.zo)
    half_order = None
    blocks = _or(arguments.ho_blocks, preset.ho_blocks)
    if preset.ho_length is not None and blocks != 0:
        half_order = HalfOrder(
            length=_half_order_length(arguments, preset, num_inference_steps, first_order_steps, blocks, zo),
            blocks=blocks,
            start=_or(arguments.ho_start, preset.ho_start),
            window=_window(arguments, num_inference_steps, stages),
            stage_windows=_stage_windows(arguments, num_inference_steps, stages),
        )
    return RLRSettings(
        first_order_steps=first_order_steps,
        half_order=half_order,
        zeroth_order=None if zo == "none" else ZerothOrder(zo, arguments.zo_scale, arguments.zo_samples),
        black_box_steps=_black_box_steps(arguments, preset, num_inference_steps),
        step_choice=arguments.step_choice,
        state_baseline=arguments.state_baseline,
        coefficients=Coefficients(arguments.fo_coefficient, arguments.ho_coefficient, arguments.zo_coefficient),
    )


def _black_box_steps(arguments: EstimatorArguments, preset: Preset, num_inference_steps: int) -> int:
    """Mirroring steps 1..n costs n (n - 1) / 2 evaluations; n = sqrt(6 T) spends 3 T, as much as the rest about.

    Measured on tiny-shapes (docs/estimators.md): variance x cost is flat around this n.
    """
    chosen = _or(arguments.black_box_steps, preset.black_box_steps)
    return min(num_inference_steps, round(math.sqrt(6 * num_inference_steps))) if chosen == "auto" else chosen


def _window(arguments: EstimatorArguments, num_inference_steps: int, stages: Stages | None) -> tuple[int, int] | None:
    """First and last step; None without a window, or for one that is measured."""
    return None if arguments.ho_window is None else window_steps(arguments.ho_window, num_inference_steps, stages)


def _stage_windows(
    arguments: EstimatorArguments, num_inference_steps: int, stages: Stages | None
) -> tuple[StageWindow, ...]:
    """What ``ho_window auto`` chooses from."""
    if stages is None or arguments.ho_window != (AUTO,):
        return ()
    return tuple(StageWindow(name, *stages.window(name, num_inference_steps)) for name in stages.names)


def _half_order_length(
    arguments: EstimatorArguments,
    preset: Preset,
    num_inference_steps: int,
    first_order_steps: int | Literal["auto", "random"],
    blocks: int | Literal["all"],
    zo: str,
) -> int:
    length = _or(arguments.ho_length, preset.ho_length)
    if length != "auto":
        return length
    lengths = []
    if arguments.nfe_budget is not None:
        if blocks == "all" or isinstance(first_order_steps, str):
            raise ValueError(
                "Expected numbers for ho_blocks and fo_steps beside ho_length auto and nfe_budget, got "
                f"ho_blocks = {blocks} and fo_steps = {first_order_steps}: tiling every step costs the same for every "
                "length, and a measured K is not known beforehand. Set both, or use --estimator rlr-paper."
            )
        rollouts = {"none": 0, "one-point": 1, "two-point": 2}[zo] * arguments.zo_samples
        lengths.append(
            half_order_length_for_compute(
                arguments.nfe_budget,
                num_inference_steps,
                first_order_steps,
                blocks,
                rollouts * num_inference_steps,
            )
        )
    if arguments.memory_budget is not None:
        assert arguments.ho_step_memory is not None and arguments.zo_step_memory is not None  # the config's checks
        lengths.append(
            half_order_length_for_memory(
                arguments.memory_budget, arguments.ho_step_memory, arguments.zo_step_memory, num_inference_steps
            )
        )
    return min(lengths)


def _or(value, default):  # type: ignore[no-untyped-def]
    return default if value is None else value
