"""`learning_rate: auto`: the images say how far one update goes.

Adam's first step moves every weight by the learning rate, whatever the gradient's size. What that does to the images
depends on the base, on rank and alpha and on the chain, so that good rates lie a hundred times apart; how much a good
first step changes the images does not. So some samples are drawn before and after the first update, with the same
noises, and the rate is the one at which their clean latents change by a set share of their standard deviation. They are
not the update's own, which may answer to it far more than others. A long chain draws them in fewer steps and without
noise: the change is nearly the same, and the search would be a fifth of a short run. The schedule starts from that
rate.

The share is `CHANGE` in a run of `OF_SAMPLES` samples. Adam's steps have one length, and what is noise in them adds up
with the square root of their number; so a run of four times as many samples takes half of it.

Adam divides a gradient g by |g| + epsilon. Where all samples of the first update are near the top of the reward, g may
be far below the usual epsilon and the step with it, and a rate that makes up for it would be ruinous in the next
update. So epsilon is small against g in this one step.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

import torch

from rlr_peft.build.machine import derive_seed
from rlr_peft.build.run import Run
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.steps import Trajectory
from rlr_peft.config import stages_from_config

logger = logging.getLogger(__name__)

# At 0.004, the best rate of a grid in the races on tiny-shapes, other samples change by 2.4 to 5.2 %, whatever the
# method, reward, rank, guidance and number of steps (`benchmarks/first_step.py`). Those races drew two images of a
# prompt, and did best at 3.5 %; as many of prompts of their own carry 1.25 times the signal or more, so that a lower
# rate goes as far. Most of them see about as many samples.
CHANGE, OF_SAMPLES = 0.028, 1_200
# The length of a run raises or lowers it by no more: beyond that nothing was tried.
LARGEST_CORRECTION = 3.0
# The first try, which moves the latents of no model far; how many more there are; what is near enough.
FIRST, TRIES, NEAR = 1e-4, 4, 1.15
# Drawn for every try, in so many steps at the most; and what a sample that rounds to none of the change counts as.
SAMPLES, MOST_STEPS, TINIEST = 8, 10, 1e-9
# Epsilon over the gradient's root mean square, at the most; the square of a gradient below that vanishes in float32.
EPSILON, FAINTEST = 1e-3, 1e-18
# One try raises or lowers the rate by no more: a change below the rounding of 16 bits says little.
LARGEST_FACTOR = 30.0


def aimed_change(samples: int) -> float:
    """Of the clean latents by the first step of a run that sees so many samples, over their standard deviation."""
    correction = math.sqrt(OF_SAMPLES / samples)
    return CHANGE * min(max(correction, 1 / LARGEST_CORRECTION), LARGEST_CORRECTION)


def rate_is_to_be_found(run: Run) -> bool:
    """Whether `learning_rate: auto` has still to find its rate, which is 0 until then."""
    return bool(run.lr_scheduler.base_lrs[0] == 0)


def take_first_step(run: Run, step: int) -> None:
    """Finds the rate and takes the optimiser's step with it; if nothing moves the images, the next update tries again.

    Args:
        run: its gradients are those of the first update.
    """
    chain, drawing = run.update_chain, _drawing_chain(run)
    _find_rate(run, drawing, step)
    if drawing is not chain:
        chain.denoiser_evaluations += drawing.denoiser_evaluations


def _drawing_chain(run: Run) -> DenoisingChain:
    """The update's own, or the same in fewer steps and without noise; every stage of its prompts keeps a step."""
    chain, stages = run.update_chain, stages_from_config(run.config)
    steps = MOST_STEPS if stages is None else max(MOST_STEPS, math.ceil(1 / min(stages.fractions)))
    return chain if chain.num_steps <= steps else chain.at(step_kind="ode", steps=steps)


def _find_rate(run: Run, chain: DenoisingChain, step: int) -> None:
    """Sets the rate by samples of this chain, and takes the step."""
    parameters, trajectories = chain.parameters, _sample(run, chain, step)
    start = [parameter.detach().clone() for parameter in parameters]
    size = _root_mean_square(parameters)
    if size < FAINTEST:  # no gradient in this update, such as a group of equal rewards
        run.optimizer.step()  # at a rate of 0: the schedule expects one
        return
    _set_rate(run, FIRST)
    with _epsilon_at_most(run, EPSILON * size):
        run.optimizer.step()
    direction = [(parameter.detach() - before) / FIRST for parameter, before in zip(parameters, start, strict=True)]
    aim = aimed_change(run.arithmetic.max_train_steps * run.samples_per_update)
    rate, change = FIRST, _relative_change(run, chain, trajectories)
    for _ in range(TRIES):
        if change == 0 or 1 / NEAR < change / aim < NEAR:
            break
        rate *= min(max(aim / change, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        _move(parameters, start, direction, rate)
        change = _relative_change(run, chain, trajectories)
    if change == 0:  # a gradient that moves nothing
        _set_rate(run, 0.0)
        return
    run.lr_scheduler.base_lrs = [rate] * len(run.optimizer.param_groups)
    warmed = rate * run.lr_scheduler.lr_lambdas[0](run.lr_scheduler.last_epoch)
    _set_rate(run, warmed)
    _move(parameters, start, direction, warmed)
    logger.info("learning_rate auto: %.2g, at which the first step changes the latents by %.1f %%.", rate, 100 * change)


def _root_mean_square(parameters: Sequence[torch.nn.Parameter]) -> float:
    """Of those of the gradient's entries that are not zero, as half of a new adapter's are; 0 without any."""
    gradients = [p.grad.double() for p in parameters if p.grad is not None]
    count = sum(int(gradient.count_nonzero()) for gradient in gradients)
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients) / count) if count else 0.0


@contextmanager
def _epsilon_at_most(run: Run, most: float) -> Iterator[None]:
    """Inside, optimisers of Adam's kind have no larger one; the others have none, or a pair."""
    groups = [group for group in run.optimizer.param_groups if isinstance(group.get("eps"), float)]
    usual = [group["eps"] for group in groups]
    for group in groups:
        group["eps"] = min(group["eps"], most)
    try:
        yield
    finally:
        for group, epsilon in zip(groups, usual, strict=True):
            group["eps"] = epsilon


def _set_rate(run: Run, rate: float) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def _move(
    parameters: Sequence[torch.nn.Parameter], start: list[torch.Tensor], direction: list[torch.Tensor], rate: float
) -> None:
    """Adam's step, its decay too, is linear in the rate."""
    for parameter, before, along in zip(parameters, start, direction, strict=True):
        parameter.copy_(before + rate * along)


def _sample(run: Run, chain: DenoisingChain, step: int) -> list[Trajectory]:
    """This process's share of the samples, which are the same for every number of processes."""
    prompts, accelerator = run.sampler.sample(step, SAMPLES), run.accelerator
    own = range(accelerator.process_index, SAMPLES, accelerator.num_processes)
    size = run.config.training.train_batch_size
    parts = [own[i : i + size] for i in range(0, len(own), size)]
    seed = run.config.training.seed
    return [
        chain.sample([prompts[i] for i in part], [derive_seed(seed, "learning_rate", step, i) for i in part])
        for part in parts
    ]


def _relative_change(run: Run, chain: DenoisingChain, trajectories: Sequence[Trajectory]) -> float:
    """Root mean square of what changed in a sample's x_0 over its standard deviation: the samples' geometric mean."""
    own: list[float] = []
    for trajectory in trajectories:
        clean = trajectory.latents[0].float()
        again = chain.denoise(trajectory, trajectory.num_steps, trajectory.latents[trajectory.num_steps]).float()
        own += ((again - clean).flatten(1).pow(2).mean(1).sqrt() / clean.flatten(1).std(1)).tolist()
    changes = run.processes.gather_objects(own, "the change of the first step")
    if not any(changes):
        return 0.0
    change = fmean(math.log(max(change, TINIEST)) for change in changes)
    return math.exp(change) if math.isfinite(change) else math.inf  # latents that a step has broken have gone too far
