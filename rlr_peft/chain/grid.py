"""Which points of the noising path a chain visits: a pipeline's scheduler turned into a grid of Gaussian steps.

Whatever solver a pipeline comes with (PNDM, DPM-Solver, UniPC, Euler, ...), its config says on which path the model was
trained: DDPM noise levels, or flow matching with a shift. The chain takes that path and its own steps.

And the other way round: which scheduler of diffusers draws what a chain draws, and what it draws otherwise where none
does the same.
"""

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import diffusers
import numpy
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from rlr_peft.chain.steps import Grid, PathPoint, PredictionType
from rlr_peft.config.chain import TimestepSpacing

SchedulerType = Literal["diffusion", "flow"]
BaseScheduler: TypeAlias = DDIMScheduler | CogVideoXDDIMScheduler | FlowMatchEulerDiscreteScheduler


def base_scheduler(
    scheduler: Any, timestep_spacing: TimestepSpacing | None = None, scheduler_type: SchedulerType | None = None
) -> BaseScheduler:
    """The scheduler that knows the path and the grid, made from the config of the one that the pipeline came with.

    Args:
        timestep_spacing: where on the path the T steps lie; None keeps what the config says.
        scheduler_type: the kind of path; None reads it off the scheduler.

    Raises:
        ValueError: the path cannot be told from the scheduler, or no Gaussian step does what the scheduler does.
    """
    kind = scheduler_type or path_type(scheduler)
    config = dict(scheduler.config)
    betas, count = config.get("trained_betas"), config.get("num_train_timesteps")
    if kind == "diffusion" and betas is not None and len(betas) != count:
        raise ValueError(
            f"{type(scheduler).__name__} has {len(betas)} trained_betas for num_train_timesteps={count}: expected one "
            "for each; correct scheduler/scheduler_config.json."
        )
    if kind == "flow":
        if timestep_spacing == "leading":
            raise ValueError("Expected timestep_spacing trailing or linspace for a flow-matching model, got leading.")
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        own = {"shift": shift, "stochastic_sampling": False}
        if timestep_spacing == "trailing":
            own["shift_terminal"] = None  # it stretches the grid until its last step is nearly empty
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        shared = {name: value for name, value in config.items() if name in known}
        return FlowMatchEulerDiscreteScheduler.from_config(shared, **own)
    spacing = {} if timestep_spacing is None else {"timestep_spacing": timestep_spacing}
    if type(scheduler).__name__.startswith("CogVideoX"):  # its betas are shifted in a way of its own
        return CogVideoXDDIMScheduler.from_config(scheduler.config, **spacing)
    if config.get("thresholding") or (config.get("clip_sample") and isinstance(scheduler, DDIMScheduler)):
        raise ValueError(
            "Expected a scheduler with clip_sample=False and thresholding=False, got "
            f"clip_sample={config.get('clip_sample')} and thresholding={config.get('thresholding')}. Load the pipeline "
            "with DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)."
        )
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, **spacing)


def prediction_type(base: BaseScheduler) -> PredictionType:
    """What the denoiser of this path outputs.

    Raises:
        ValueError: something that the chain's steps do not know, such as the clean latents themselves ("sample").
    """
    if isinstance(base, FlowMatchEulerDiscreteScheduler):
        return "flow_prediction"
    kind = base.config.prediction_type
    if kind not in get_args(PredictionType):
        raise ValueError(
            f"The base's scheduler says prediction_type={kind!r}, and the chain's steps know "
            f"{', '.join(get_args(PredictionType))}: correct scheduler/scheduler_config.json if the model was trained "
            "for one of them, else take another base."
        )
    return kind


def check_grid(grid: Grid, kind: PredictionType) -> None:
    """Refuses a grid on which a step is not defined.

    Raises:
        ValueError: epsilon prediction from pure noise, noise levels that are no numbers or grow along the chain, or a
            step from where no noise is left.
    """
    for number, (point, following) in enumerate(zip(grid.points, grid.followings, strict=True)):
        levels = (point.alpha, point.sigma, following.alpha, following.sigma)
        is_rising = following.sigma > point.sigma or point.sigma == 0 or following.alpha == 0
        if not all(map(math.isfinite, levels)) or is_rising:
            raise ValueError(
                f"The base's scheduler leads from noise level {point.sigma:.4g} to {following.sigma:.4g} in step "
                f"{number + 1} of {grid.num_steps}: expected levels that fall. Correct its betas or sigmas in "
                "scheduler/scheduler_config.json, or take fewer steps with --num_inference_steps."
            )
        if kind == "epsilon" and point.alpha == 0:
            raise ValueError(
                "The base's scheduler starts at pure noise (rescale_betas_zero_snr), where epsilon prediction leaves "
                "the image undetermined: set rescale_betas_zero_snr to false in scheduler/scheduler_config.json, or "
                "prediction_type to v_prediction if the model was trained for it; --timestep_spacing leading keeps "
                "clear of pure noise too."
            )


def make_grid(
    base: BaseScheduler,
    num_inference_steps: int,
    timestep_spacing: TimestepSpacing | None = None,
    sigmas: Any = None,
    mu: float | None = None,
    timesteps: Any = None,
) -> Grid:
    """The grid of a base scheduler.

    Args:
        base: of ``base_scheduler``.
        num_inference_steps: T.
        timestep_spacing: for flows: ``trailing`` starts from noise levels 1, ..., 2/T, 1/T and then shifts them, so
            that the last step has work to do; ``linspace`` is the scheduler's own grid, whose last step is nearly
            empty; None takes the noise levels that the pipeline asks for, else trailing.
        sigmas: noise levels that the pipeline asks for.
        mu: the shift that the pipeline derives from the resolution.
        timesteps: what the pipeline tells the denoiser besides its noise levels: those before the shift, as CogView 4.
    """
    if not isinstance(base, FlowMatchEulerDiscreteScheduler):
        return diffusion_grid(base, num_inference_steps)
    if timestep_spacing == "linspace":
        sigmas = None
    elif timestep_spacing == "trailing" or sigmas is None:
        sigmas = requested_sigmas(base, num_inference_steps, timestep_spacing)
    shift = {"mu": mu} if base.config.use_dynamic_shifting else {}
    told = {}
    if timesteps is not None and sigmas is not None:
        told["timesteps"] = [float(sigma) * base.config.num_train_timesteps for sigma in sigmas]
    base.set_timesteps(None if sigmas is not None else num_inference_steps, sigmas=sigmas, **shift, **told)
    levels = noise_levels(base)
    points = tuple(PathPoint(1 - sigma, sigma) for sigma in levels)
    return Grid(timesteps=base.timesteps.clone(), points=points[:-1], followings=points[1:])


def noise_levels(scheduler: FlowMatchEulerDiscreteScheduler) -> list[float]:
    """Of the grid that a flow's scheduler was set to, clean last; Mochi's and OmniGen's count the other way, from 0."""
    levels: list[float] = scheduler.sigmas.tolist()
    return [1 - level for level in levels] if scheduler.config.invert_sigmas else levels


def requested_sigmas(
    base: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, timestep_spacing: TimestepSpacing | None
) -> numpy.ndarray:
    """The noise levels before any shift, (T,), of the grid that ``make_grid`` takes by itself."""
    if timestep_spacing != "linspace":
        return numpy.linspace(1, 1 / num_inference_steps, num_inference_steps)
    first, last = base._sigma_to_t(base.sigma_max), base._sigma_to_t(base.sigma_min)
    return numpy.linspace(first, last, num_inference_steps) / base.config.num_train_timesteps


def diffusion_grid(scheduler: DDIMScheduler | CogVideoXDDIMScheduler, num_inference_steps: int) -> Grid:
    """The grid of ``DDIMScheduler``, including where it places the end of every step."""
    scheduler.set_timesteps(num_inference_steps)
    stride = scheduler.config.num_train_timesteps // num_inference_steps

    def point(timestep: int) -> PathPoint:
        alpha_squared = scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod
        return PathPoint(float(alpha_squared) ** 0.5, max(0.0, 1 - float(alpha_squared)) ** 0.5)

    # Trailing timesteps come from a floating-point arange, which for some T (61, 103, ...) has one too many: -1.
    timesteps = scheduler.timesteps[:num_inference_steps].clone()
    return Grid(
        timesteps=timesteps,
        points=tuple(point(timestep) for timestep in timesteps.tolist()),
        followings=tuple(point(timestep - stride) for timestep in timesteps.tolist()),
    )


def path_type(scheduler: Any) -> SchedulerType:
    """The noising path that a scheduler of diffusers knows.

    Raises:
        ValueError: it cannot be told.
    """
    config = dict(scheduler.config)
    is_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if is_flow or type(scheduler).__name__.startswith("FlowMatch"):
        return "flow"
    if "beta_schedule" in config:
        return "diffusion"
    raise ValueError(
        f"Could not determine the noising path of {type(scheduler).__name__}: expected the betas of a DDPM path or a "
        "flow-matching scheduler. Set --scheduler_type to diffusion or flow if you know that the model is one of them."
    )


def scheduler_class(name: str) -> Any:
    """A scheduler's class of diffusers by its name.

    Raises:
        ValueError: there is none.
    """
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"Expected a scheduler of diffusers, such as DPMSolverMultistepScheduler, got {name}.")
    return kind


def own_scheduler(own: Any, class_name: str) -> Any:
    """A scheduler by name in place of the one that a pipeline came with, with its config.

    Raises:
        ValueError: diffusers has no such scheduler, or it takes another noising path.
    """
    scheduler = scheduler_class(class_name).from_config(own.config)
    wanted, got = path_type(own), path_type(scheduler)
    if wanted != got:
        raise ValueError(
            f"Expected a scheduler of the {wanted} path, on which the model was trained, got {class_name}, which takes "
            f"the {got} path."
        )
    return scheduler


@dataclass(frozen=True)
class InferenceScheduler:
    """How a pipeline without the chain steps as the chain does.

    Attributes:
        class_name: of diffusers.
        options: over the config of the pipeline's own scheduler, in plain values.
        settings: the options and where the steps lie, to be named.
        sigmas: noise levels, before any shift, that the scheduler must be told; empty where the pipeline's own request
            gives the chain's grid already.
        sigmas_in_call: whether the pipeline's call takes them.
        eta: of the pipeline's call; 0 where it is left out.
        difference: a sentence on what the pipeline draws otherwise; None where it draws the same images.
    """

    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sigmas: tuple[float, ...] = ()
    sigmas_in_call: bool = False
    eta: float = 0.0
    difference: str | None = None

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in self.settings.items()]
        return ", ".join([self.class_name, *words])

    def call_options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        sigmas = {"sigmas": list(self.sigmas)} if self.sigmas and self.sigmas_in_call else {}
        return sigmas | ({"eta": self.eta} if self.eta else {})


def inference_scheduler(
    own_config: Any,
    base: BaseScheduler,
    grid: Grid,
    request: Mapping[str, Any],
    *,
    timestep_spacing: TimestepSpacing | None,
    noise: str | None,
    eta: float,
    call_parameters: Collection[str],
) -> InferenceScheduler:
    """What draws like a chain.

    Args:
        request: how the pipeline asked for its timesteps: num_inference_steps, sigmas and mu, those that it gave.
        timestep_spacing: of the grid, see ``make_grid``.
        noise: the kind of the chain's steps; None where they add no noise.
    """
    kind = type(base)
    options = _differing(base.config, kind.from_config(own_config).config, kind)
    scheduler = kind.from_config(own_config, **options)
    sigmas: tuple[float, ...] = ()
    is_flow, in_call = isinstance(base, FlowMatchEulerDiscreteScheduler), "sigmas" in call_parameters
    # A pipeline that tells its scheduler levels of its own, and takes none, cannot be told others.
    if is_flow and not _same_grid(scheduler, grid, request) and (in_call or "sigmas" not in request):
        sigmas = tuple(requested_sigmas(base, grid.num_steps, timestep_spacing).tolist())
        request = {**request, "sigmas": list(sigmas)}
    takes_eta = isinstance(base, DDIMScheduler) and noise == "ancestral" and "eta" in call_parameters
    difference = None
    if not _same_grid(scheduler, grid, request):
        difference = (
            f"{kind.__name__} in this pipeline places {grid.num_steps} steps elsewhere than the chain that the numbers "
            "were measured with."
        )
    elif takes_eta:
        difference = (
            "It takes the steps that were measured, eta included, but draws their noise in another order: its images "
            "come from the same distribution and are not the same ones."
        )
    elif noise is not None:
        difference = (
            f"No scheduler of diffusers takes the {noise} steps with eta {eta:g} that the numbers were measured with: "
            "it draws without noise on the same grid, and the numbers are of the chain with noise."
        )
    return InferenceScheduler(
        class_name=kind.__name__,
        options=options,
        settings=options if is_flow else {**options, "timestep_spacing": base.config.timestep_spacing},
        sigmas=sigmas,
        sigmas_in_call=in_call,
        eta=eta if takes_eta else 0.0,
        difference=difference,
    )


def build_scheduler(own_config: Any, class_name: str, options: Mapping[str, Any], sigmas: Sequence[float] = ()) -> Any:
    """The scheduler that a record names, from the config of the pipeline's own.

    Args:
        sigmas: noise levels that it is to take whatever number of steps it is asked for.

    Raises:
        ValueError: diffusers has no such scheduler.
    """
    scheduler = scheduler_class(class_name).from_config(own_config, **options)
    if sigmas:
        scheduler.set_timesteps = partial(scheduler.set_timesteps, sigmas=list(sigmas))
    return scheduler


def _differing(wanted: Any, got: Any, kind: type[BaseScheduler]) -> dict[str, Any]:
    """The settings of the class that another config would get otherwise."""
    names = kind._get_init_keys(kind) - {"self", "kwargs"}
    return {name: wanted[name] for name in sorted(names) if wanted[name] != got[name]}


def _same_grid(scheduler: BaseScheduler, grid: Grid, request: Mapping[str, Any]) -> bool:
    """Whether the scheduler, asked as the pipeline asks, visits the points of the grid."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(**request)
        got, levels = noise_levels(scheduler), [point.sigma for point in (*grid.points, grid.followings[-1])]
    else:
        scheduler.set_timesteps(request["num_inference_steps"])
        got, levels = scheduler.timesteps.tolist(), grid.timesteps.tolist()
    return len(got) == len(levels) and bool(numpy.allclose(got, levels, rtol=0, atol=1e-6))
