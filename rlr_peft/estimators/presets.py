"""The named estimators: which terms each is made of, and what the config may change about it."""

from dataclasses import dataclass
from typing import Literal

from rlr_peft.config import EstimatorArguments
from rlr_peft.estimators.half_order import HalfOrder, StartSampler
from rlr_peft.estimators.plan import RLRSettings
from rlr_peft.estimators.planning import half_order_length_for_compute, half_order_length_for_memory
from rlr_peft.estimators.zeroth_order import ZerothOrder


@dataclass(frozen=True)
class Preset:
    """Defaults of one named estimator; a config's explicit values replace them."""

    fo_steps: int | Literal["auto", "all"]
    ho_length: int | None
    ho_blocks: int | Literal["all"] = "all"
    ho_start: StartSampler = "uniform"
    zo: Literal["none", "one-point", "two-point"] = "none"
    black_box_steps: int = 0


PRESETS = {
    # Our default: measured crossing of the per-step variances, single-step score terms beyond it.
    "rlr": Preset(fo_steps="auto", ho_length=1, black_box_steps=4),
    # The paper's form with its formula corrected: one FO step, one free block of length h, ZO on the complement.
    "rlr-paper": Preset(fo_steps=1, ho_length=2, ho_blocks=1, zo="two-point"),
    "full-bp": Preset(fo_steps="all", ho_length=None),
    "truncated-bp": Preset(fo_steps=1, ho_length=None),
    "reinforce": Preset(fo_steps=0, ho_length=1),
}


def settings_from_arguments(arguments: EstimatorArguments, num_inference_steps: int) -> RLRSettings:
    """The estimator's settings: the preset's, with the config's explicit values in their place.

    Raises:
        ValueError: a budget that does not allow a block of one step, or one that cannot decide the length.
    """
    preset = PRESETS[arguments.estimator]
    fo_steps = _or(arguments.fo_steps, preset.fo_steps)
    first_order_steps = num_inference_steps if fo_steps == "all" else fo_steps
    zo = _or(arguments.zo, preset.zo)
    half_order = None
    if preset.ho_length is not None:
        blocks = _or(arguments.ho_blocks, preset.ho_blocks)
        half_order = HalfOrder(
            length=_half_order_length(arguments, preset, num_inference_steps, first_order_steps, blocks, zo),
            blocks=blocks,
            start=_or(arguments.ho_start, preset.ho_start),
            window=None if arguments.ho_window is None else (arguments.ho_window[0], arguments.ho_window[1]),
        )
    return RLRSettings(
        first_order_steps=first_order_steps,
        half_order=half_order,
        zeroth_order=None if zo == "none" else ZerothOrder(zo, arguments.zo_scale, arguments.zo_samples),
        black_box_steps=_or(arguments.black_box_steps, preset.black_box_steps),
    )


def _half_order_length(
    arguments: EstimatorArguments,
    preset: Preset,
    num_inference_steps: int,
    first_order_steps: int | Literal["auto"],
    blocks: int | Literal["all"],
    zo: str,
) -> int:
    length = _or(arguments.ho_length, preset.ho_length)
    if length != "auto":
        return length
    lengths = []
    if arguments.nfe_budget is not None:
        if blocks == "all" or first_order_steps == "auto":
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
