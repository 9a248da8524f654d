"""The diffusers scheduler that draws what a chain draws, and what it draws otherwise where none does the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from rlr_peft.chain.grids import BaseScheduler, Grid, TimestepSpacing, requested_sigmas

CLASSES = {kind.__name__: kind for kind in (DDIMScheduler, CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler)}


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
    options: Mapping[str, Any]
    settings: Mapping[str, Any]
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
        own_config: of the pipeline's own scheduler.
        base: knows the chain's path.
        grid: where the chain's steps lie.
        request: how the pipeline asked for its timesteps: num_inference_steps, sigmas and mu, those that it gave.
        timestep_spacing: of the grid, see ``make_grid``.
        noise: the kind of the chain's steps; None where they add no noise.
        eta: amount of noise.
        call_parameters: what the pipeline's call takes.
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
        own_config: of the pipeline's own scheduler.
        class_name: of diffusers.
        options: over that config.
        sigmas: noise levels that it is to take whatever number of steps it is asked for.

    Raises:
        ValueError: another class than a chain's steps equal.
    """
    if class_name not in CLASSES:
        raise ValueError(f"Expected the scheduler {' or '.join(CLASSES)}, got {class_name}.")
    scheduler = CLASSES[class_name].from_config(own_config, **options)
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
        got, levels = scheduler.sigmas.tolist(), [point.sigma for point in (*grid.points, grid.followings[-1])]
    else:
        scheduler.set_timesteps(request["num_inference_steps"])
        got, levels = scheduler.timesteps.tolist(), grid.timesteps.tolist()
    return len(got) == len(levels) and bool(numpy.allclose(got, levels, rtol=0, atol=1e-6))
