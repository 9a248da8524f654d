"""From the knobs of a method to its estimator."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

from rlr_peft.config import window_steps
from rlr_peft.config.chain import AUTO
from rlr_peft.config.estimator import (
    CalibratedArguments,
    EstimatorArguments,
    PathwiseArguments,
    PolicyGradientArguments,
    ScoreTermArguments,
    ThreeOrdersArguments,
)
from rlr_peft.config.forward import (
    AWMArguments,
    BasePulledArguments,
    ForwardArguments,
    NFTArguments,
    RAMArguments,
)
from rlr_peft.config.methods import (
    AdjointMatchingArguments,
    AutoArguments,
    D3POArguments,
    DDPOArguments,
    DRaFTLVArguments,
    DRTuneArguments,
    FlowBPBridgeArguments,
    FlowBPSparseArguments,
    FullBPArguments,
    GRPOArguments,
    LeapArguments,
    ReFLArguments,
    RSMArguments,
    TruncatedBPArguments,
)
from rlr_peft.estimators.adjoint_matching import AdjointMatchingEstimator
from rlr_peft.estimators.auto import AutoEstimator
from rlr_peft.estimators.base import Estimator
from rlr_peft.estimators.block_length import half_order_length_for_compute, half_order_length_for_memory
from rlr_peft.estimators.forward import ForwardEstimator, ForwardSettings, awm_pull, nft_pull, ram_pull
from rlr_peft.estimators.half_order import HalfOrder, StageWindow
from rlr_peft.estimators.layout import Coefficients, RLRSettings
from rlr_peft.estimators.pathwise import PathwiseEstimator, PathwiseSettings
from rlr_peft.estimators.policy import (
    PolicyGradientEstimator,
    PolicyGradientSettings,
    PreferenceEstimator,
    PreferenceSettings,
)
from rlr_peft.estimators.rlr import RLREstimator
from rlr_peft.estimators.zeroth_order import ZerothOrder
from rlr_peft.prompt import Stages


def build_estimator(
    arguments: EstimatorArguments,
    num_inference_steps: int,
    stages: Stages | None = None,
    samples: int = 1,
    measures_batch: bool = False,
) -> Estimator:
    """The estimator of a method.

    Args:
        arguments: its knobs.
        num_inference_steps: T.
        stages: those that ``ho_window`` may name.
        samples: of an update, in all processes.
        measures_batch: whether ``auto`` chooses how many times as many an update has, up to its calibration's samples.

    Raises:
        ValueError: a budget that does not allow a block of one step, or one that cannot decide the length.
    """
    match arguments:
        case AutoArguments():
            settings = settings_from_arguments(arguments.rlr, num_inference_steps, stages)
            rlr = RLREstimator(settings, arguments.antithetic, samples)
            most = arguments.calibration_samples if measures_batch else None
            awm = ForwardEstimator(_forward(AWMArguments()), draws_without_noise=True)
            return AutoEstimator(rlr, awm, num_inference_steps, samples, most)
        case AdjointMatchingArguments():
            return AdjointMatchingEstimator(arguments.fo_steps, arguments.reward_scale, arguments.fo_coefficient)
        case PathwiseArguments() | ReFLArguments():
            return PathwiseEstimator(pathwise_settings(arguments))
        case D3POArguments():
            steps = _half_order(arguments, 1, num_inference_steps, stages)
            return PreferenceEstimator(PreferenceSettings(arguments.dpo_beta, steps, arguments.inner_epochs))
        case ForwardArguments():
            return ForwardEstimator(_forward(arguments))
        case PolicyGradientArguments():
            return PolicyGradientEstimator(_policy_gradient(arguments, num_inference_steps, stages))
        case _:
            settings = settings_from_arguments(arguments, num_inference_steps, stages)
            return RLREstimator(settings, arguments.antithetic, samples)


def settings_from_arguments(
    arguments: EstimatorArguments, num_inference_steps: int, stages: Stages | None = None
) -> RLRSettings:
    """The terms of a method of the RLR family.

    Raises:
        ValueError: a budget that does not allow a block of one step, or one that cannot decide the length.
        TypeError: another method.
    """
    match arguments:
        case ThreeOrdersArguments():
            return _three_orders(arguments, num_inference_steps, stages)
        case CalibratedArguments():
            return RLRSettings(
                first_order_steps=0,
                half_order=_half_order(arguments, 1, num_inference_steps, stages),
                black_box_steps=_black_box_steps(arguments, num_inference_steps),
                state_baseline=arguments.state_baseline,
                coefficients=Coefficients(half_order=arguments.ho_coefficient),
            )
        case _:
            raise TypeError(f"expected a method of the RLR family, got {arguments.estimator}")


def pathwise_settings(arguments: PathwiseArguments | ReFLArguments) -> PathwiseSettings:
    """The member of the pathwise family that a method is.

    Raises:
        TypeError: another method.
    """
    settings = PathwiseSettings(arguments.estimator, antithetic=arguments.antithetic)
    if isinstance(arguments, PathwiseArguments):
        settings = replace(settings, coefficient=arguments.fo_coefficient)
    match arguments:
        case FullBPArguments():
            return settings
        case TruncatedBPArguments(fo_steps="random"):
            return replace(settings, steps="random")
        case TruncatedBPArguments(fo_steps=int(steps)):
            return replace(settings, num_steps=steps)
        case DRaFTLVArguments():
            return replace(settings, num_steps=1, renoised=arguments.renoised_copies)
        case ReFLArguments():
            return replace(settings, steps="late", num_steps=arguments.fo_steps, sees_prediction=True)
        case DRTuneArguments():
            return replace(
                settings,
                steps="spaced",
                num_steps=arguments.fo_steps,
                carry=0.0,
                stop_share=arguments.stop_share,
                sees_prediction=True,
            )
        case LeapArguments():
            return replace(settings, steps="leap", num_steps=2, carry=arguments.fo_carry)
        case FlowBPSparseArguments():
            return replace(
                settings,
                steps="drawn",
                num_steps=arguments.fo_steps,
                carry=arguments.fo_carry if isinstance(arguments, FlowBPBridgeArguments) else 0.0,
                density=arguments.step_density,
                step_correction=arguments.step_correction,
            )
        case RSMArguments():
            return replace(
                settings, steps="drawn", num_steps=arguments.fo_steps, carry=0.0, weighted_by_std=True, clips=True
            )
        case _:
            raise TypeError(f"expected a method of the pathwise family, got {arguments.estimator}")


def _three_orders(arguments: ThreeOrdersArguments, num_inference_steps: int, stages: Stages | None) -> RLRSettings:
    half_order = None
    if arguments.ho_blocks != 0:
        length = _half_order_length(arguments, num_inference_steps)
        half_order = _half_order(arguments, length, num_inference_steps, stages)
    perturbed = ZerothOrder(arguments.zo, arguments.zo_scale, arguments.zo_samples) if arguments.zo != "none" else None
    return RLRSettings(
        first_order_steps=arguments.fo_steps,
        roulette=arguments.fo_roulette,
        half_order=half_order,
        zeroth_order=perturbed,
        black_box_steps=_black_box_steps(arguments, num_inference_steps),
        step_choice=arguments.step_choice,
        state_baseline=arguments.state_baseline,
        coefficients=Coefficients(arguments.fo_coefficient, arguments.ho_coefficient, arguments.zo_coefficient),
    )


def _policy_gradient(
    arguments: PolicyGradientArguments, num_inference_steps: int, stages: Stages | None
) -> PolicyGradientSettings:
    own: dict[str, Any]
    match arguments:
        case DDPOArguments():
            own = {
                "advantage": "prompt-statistics",
                "prompt_buffer_size": arguments.per_prompt_stat_tracking_buffer_size,
                "prompt_min_count": arguments.per_prompt_stat_tracking_min_count,
            }
        case GRPOArguments():
            own = {"advantage": arguments.advantage_std}
        case _:
            raise TypeError(f"expected a policy gradient, got {arguments.estimator}")
    return PolicyGradientSettings(
        steps=_half_order(arguments, 1, num_inference_steps, stages),
        inner_epochs=arguments.inner_epochs,
        clip_range=arguments.clip_range,
        ratio_norm=arguments.ratio_norm,
        divergence_limit=arguments.divergence_limit,
        advantage_clip=arguments.advantage_clip,
        **own,
    )


def _forward(arguments: ForwardArguments) -> ForwardSettings:
    own: dict[str, Any]
    match arguments:
        case RAMArguments():
            scale = arguments.reward_scale
            own = {"name": f"RAM with scale {scale:g}", "pull": partial(ram_pull, scale=scale), "needs_base": True}
        case NFTArguments():
            own = {
                "name": f"DiffusionNFT with beta {arguments.nft_beta:g}",
                "pull": partial(nft_pull, beta=arguments.nft_beta, clip=arguments.advantage_clip),
            }
        case AWMArguments():
            own = {
                "name": f"AWM with ratios clipped at {arguments.clip_range:g}, pull to the old {arguments.old_pull:g}",
                "pull": partial(awm_pull, clip=arguments.clip_range, old_pull=arguments.old_pull),
            }
        case _:
            raise TypeError(f"expected a forward-process method, got {arguments.estimator}")
    return ForwardSettings(
        **own,
        levels=arguments.noise_levels,
        level_density=arguments.level_density,
        advantage_clip=arguments.advantage_clip,
        advantage_std=arguments.advantage_std,
        old_decay=arguments.old_decay,
        old_decay_growth=arguments.old_decay_growth,
        base_pull=arguments.base_pull if isinstance(arguments, BasePulledArguments) else 0.0,
        norm_penalty=arguments.norm_penalty,
        norm_margin=arguments.norm_margin,
        inner_epochs=arguments.inner_epochs,
    )


def _half_order(
    arguments: ScoreTermArguments, length: int, num_inference_steps: int, stages: Stages | None
) -> HalfOrder:
    window, measured = None, tuple[StageWindow, ...]()
    if arguments.ho_window is not None:
        window = window_steps(arguments.ho_window, num_inference_steps, stages)
    if stages is not None and arguments.ho_window == (AUTO,):
        measured = tuple(StageWindow(name, *stages.window(name, num_inference_steps)) for name in stages.names)
    return HalfOrder(length, arguments.ho_blocks, arguments.ho_start, window, measured)


def _black_box_steps(arguments: CalibratedArguments, num_inference_steps: int) -> int:
    """Mirroring steps 1..n costs n (n - 1) / 2 evaluations; n = sqrt(6 T) spends 3 T, as much as the rest about.

    Measured on tiny-shapes (docs/estimators_measured.md): variance x cost is flat around this n.
    """
    if arguments.black_box_steps == "auto":
        return min(num_inference_steps, round(math.sqrt(6 * num_inference_steps)))
    return arguments.black_box_steps


def _half_order_length(arguments: ThreeOrdersArguments, num_inference_steps: int) -> int:
    if arguments.ho_length != "auto":
        return arguments.ho_length
    fo_steps, blocks, lengths = arguments.fo_steps, arguments.ho_blocks, []
    if arguments.nfe_budget is not None:
        if blocks == "all" or fo_steps == "auto":
            raise ValueError(
                "Expected numbers for ho_blocks and fo_steps beside ho_length auto and nfe_budget, got "
                f"ho_blocks = {blocks} and fo_steps = {fo_steps}: tiling every step costs the same for every "
                "length, and a measured K is not known beforehand. Set both, or use --estimator rlr-paper."
            )
        evaluations = arguments.zo_chains * num_inference_steps
        lengths.append(
            half_order_length_for_compute(arguments.nfe_budget, num_inference_steps, fo_steps, blocks, evaluations)
        )
    if arguments.memory_budget is not None:
        assert arguments.ho_step_memory is not None and arguments.zo_step_memory is not None  # the config's checks
        lengths.append(
            half_order_length_for_memory(
                arguments.memory_budget, arguments.ho_step_memory, arguments.zo_step_memory, num_inference_steps
            )
        )
    return min(lengths)
