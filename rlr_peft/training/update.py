"""One update: sample, score, gather, advantages, segments, all-reduce once, clip, step, learn."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from rlr_peft.build.machine import Purpose, derive_seed
from rlr_peft.build.processes import Processes
from rlr_peft.build.run import Run
from rlr_peft.chain.adjoint import DerivativeError
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.config.chain import AUTO
from rlr_peft.config.estimator import MeasuringArguments
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.base import Book, Coverage, Estimator, add_term, coverage_of, over_updates
from rlr_peft.estimators.kl import kl_segments, path_kl, reference_steps
from rlr_peft.estimators.objective import Batch, Rollout, sample_batch
from rlr_peft.prompt import Prompt
from rlr_peft.rewards.scores import info_means, join_info
from rlr_peft.training.learning_rate import rate_is_to_be_found, take_first_step
from rlr_peft.training.progress import SATISFIED, is_due_after

logger = logging.getLogger(__name__)

# Squares of entries much below this vanish in float32, and with them the norm.
TINY_NORM = 1e-15
# Of a run's cost, where calibrations are as frequent and as large as that allows.
CALIBRATION_SHARE = 0.05
# A measured sample costs its chain of T steps and T replays with up to three backward passes each; a trained one its
# chain, a short tail and its reward. In denoiser evaluations, for T steps and besides them.
MEASURED_STEP, TRAINED_TAIL = 8.0, 5.0
# Images of a prompt in a calibration, unless that is given: as few as can be compared, which are much alike.
FEWEST_COMPARED = 2


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        rewards: of the samples of all processes, (samples_per_update,); a weighted sum is that on its first scales.
        heldout: held-out scores of the same samples; None without a held-out reward.
        kl: estimates of the samples' divergence from the base in nats, (samples_per_update,); None if not measured.
        coverage: what the gradient estimate covered.
        books: of all processes' micro-batches, in the last inner epoch.
        gradient_norm: of the mean reward's gradient, before clipping, in the last inner epoch.
        learning_rate: of the last optimiser step.
        info: means of the numbers that the rewards give beside their scores, `reward/NAME` and `heldout/NAME`.
    """

    rewards: torch.Tensor
    heldout: torch.Tensor | None
    kl: torch.Tensor | None
    coverage: Coverage
    books: list[Book]
    gradient_norm: float
    learning_rate: float
    info: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """The update's numbers for the logs; ``loss`` is minus the mean reward."""
        metrics = {
            "reward": float(self.rewards.mean()),
            "reward_se": standard_error(self.rewards),
            "loss": -float(self.rewards.mean()),
            "gradient_norm": self.gradient_norm,
            "lr": self.learning_rate,
            "first_order_steps": fmean(book.first_order_steps for book in self.books),
        }
        if self.heldout is not None:
            metrics |= {"heldout": float(self.heldout.mean()), "heldout_se": standard_error(self.heldout)}
        if self.kl is not None:  # no standard error: the samples of a micro-batch share their drawn steps
            metrics["kl"] = float(self.kl.mean())
        # A term that is drawn, or that a random K leaves no room, need not be in every micro-batch.
        norms = [book.norms() for book in self.books]
        for term in dict.fromkeys(itertools.chain.from_iterable(norms)):
            metrics[f"gradient_norm/{term}"] = fmean(by_term.get(term, 0.0) for by_term in norms)
        numbers = [book.numbers() for book in self.books]
        for name in dict.fromkeys(itertools.chain.from_iterable(numbers)):
            metrics[name] = fmean(values[name] for values in numbers if name in values)
        return metrics | self.info


def take_update(run: Run, step: int) -> Update:
    """One or more optimiser steps on the samples of ``step``.

    Raises:
        RewardError: bad scores; nothing has been updated.
        DerivativeError: the gradient is not finite; this optimiser step has not been taken.
    """
    moving = run.config.chain.moving_window
    if moving is not None:
        run.chain.place_noise(*moving.at(step, derive_seed(run.config.training.seed, "noise_window", step)))
    images_per_prompt = run.num_images_per_prompt
    chain = run.update_chain
    batch = sample_step(run, chain, step, images_per_prompt)
    prompts = run.processes.gather_objects(batch.prompts, "the prompts")
    scores = run.processes.gather(batch.scored.scores, "the rewards")
    info = _gather_info(run, batch)
    raw = {name: info[f"reward/{name}"] for name in batch.scored.raw}
    estimator = run.estimator.for_reward(run.objective.has_gradient)
    advantages = _advantages(run, estimator, scores, raw, prompts, images_per_prompt)
    rollouts, micro_batch_size = batch.rollouts, run.config.training.train_batch_size
    own_advantages = advantages[_own_samples(run)].split(micro_batch_size)
    coverage = coverage_of(estimator, chain, rollouts[0].reward_gradient is not None)
    if moving is not None:
        coverage = over_updates(coverage, moving)
    kl: torch.Tensor | None = None
    for epoch in range(estimator.inner_epochs):
        books, divergences = [], []
        for i, (rollout, own) in enumerate(zip(rollouts, own_advantages, strict=True)):
            micro_batch = run.accelerator.process_index * len(rollouts) + i
            first_prompt = micro_batch * micro_batch_size // images_per_prompt
            draw = first_prompt if estimator.shares_draws else micro_batch
            book, divergence = _add_gradients(run, chain, estimator, rollout, own, step, draw, epoch)
            books.append(book)
            divergences += [] if divergence is None else [divergence]
        all_reduce_mean_descent(run.chain.parameters, run.samples_per_update, run.processes)
        run.estimator.see_gradient(run.chain.parameters, run.samples_per_update)
        gradient_norm = _clip(run, step)
        if rate_is_to_be_found(run):
            take_first_step(run, step)
        else:
            run.optimizer.step()
        if run.ema is not None:
            run.ema.step(run.chain.parameters)
        run.optimizer.zero_grad(set_to_none=True)
        if epoch == 0 and divergences:
            kl = run.processes.gather(torch.cat(divergences), "the divergences")
    rate = float(run.optimizer.param_groups[0]["lr"])
    run.lr_scheduler.step()
    books = run.processes.gather_objects(books, "the estimator's numbers")
    run.estimator.learn(books)
    heldout = None if batch.heldout is None else run.processes.gather(batch.heldout.scores, "the held-out scores")
    shown = run.reward.scores_on_first_scales(scores, raw)
    update = Update(shown, heldout, kl, coverage, books, gradient_norm, rate, _logged_info(run, info, scores))
    # Only now: all that the update scored, mirrored samples too, is divided by the scales of earlier ones.
    run.reward.learn(raw)
    if run.rollback is not None:
        run.rollback.see(update.rewards, images_per_prompt)
    return update


def _advantages(
    run: Run,
    estimator: Estimator,
    scores: torch.Tensor,
    raw: Mapping[str, torch.Tensor],
    prompts: list[str],
    group_size: int,
) -> torch.Tensor:
    """Advantages (N,) of all processes' samples, of their scores (N,) or, with GDPO, of every reward's by itself."""
    if run.config.reward.reward_scaling == "group":
        weights = dict(zip(run.reward.part_names, run.config.reward.weights.values(), strict=True))
        return estimator.advantages_of_each(raw, weights, group_size).to(scores)
    return estimator.advantages(run.objective.limited(scores), prompts, group_size)


def calibration_due(run: Run, step: int) -> bool:
    """Whether to ``calibrate`` before this step: every so often, and when a run came to a measured K as it was resumed.

    A reward without gradient may leave nothing to choose; whether it has one may show only with the first samples.
    """
    knobs = run.config.estimator.calibration
    if knobs is None or (step % calibration_interval(run, knobs) and run.estimator.is_calibrated):
        return False
    wanted = run.estimator.wants_calibration(run.objective.has_gradient)
    return bool(run.processes.largest(int(wanted), "the need of a calibration"))


def calibration_interval(run: Run, knobs: MeasuringArguments) -> int:
    """Updates between two calibrations."""
    if knobs.calibration_interval != "auto":
        return knobs.calibration_interval
    share = _cost_of_measuring(run) * calibration_samples(run, knobs) / run.samples_per_update
    return math.ceil(share / CALIBRATION_SHARE)


def calibration_samples(run: Run, knobs: MeasuringArguments) -> int:
    """Of one calibration; a run that is too short for the given number, and may choose how often, takes fewer."""
    if knobs.calibration_interval != "auto":
        return knobs.calibration_samples
    trained = run.arithmetic.max_train_steps * run.samples_per_update
    paid_for = int(CALIBRATION_SHARE * trained / _cost_of_measuring(run))
    return min(knobs.calibration_samples, max(run.estimator.fewest_measured, paid_for))


def _cost_of_measuring(run: Run) -> float:
    """Of a sample, in trained ones."""
    steps = run.chain.num_steps
    return MEASURED_STEP * steps / (steps + TRAINED_TAIL)


def calibrate(run: Run, step: int) -> None:
    """Measures the terms' variances on samples of their own; every process measures the same ones."""
    arguments, training = run.config.estimator.calibration, run.config.training
    assert arguments is not None, "only methods that have the knobs ask for a calibration"
    group_size = FEWEST_COMPARED if training.num_images_per_prompt == AUTO else training.compared_images
    # Single samples are replayed, and dropout's masks depend on the size of the batch.
    micro_batch_size = 1 if run.chain.denoiser.training else training.train_batch_size
    prompts = run.sampler.sample(step, math.ceil(calibration_samples(run, arguments) / group_size))
    repeated, seeds = _repeat(run, step, "calibration", prompts, group_size)
    batch = sample_batch(run.chain, run.objective, repeated, seeds, micro_batch_size)
    advantages = leave_one_out(batch.rewards, group_size)
    before = run.method_in_words
    run.estimator.calibrate(run.chain, batch.rollouts, advantages, arguments.calibration_decay)
    # Sums on GPUs differ in their last digits, which may tip the choice of K: all go by the main process's numbers.
    run.estimator.load_state_dict(run.processes.broadcast(run.estimator.state_dict(), "the calibration"))
    after = run.method_in_words
    if after != before:
        logger.info("Estimator = %s: %s.", run.method, after)


def sample_step(run: Run, chain: DenoisingChain, step: int, images_per_prompt: int) -> Batch:
    """This process's samples of a step; a pure function of the config's seed, the weights and the step.

    Whether the reward has a gradient may show only with the first ones.
    """
    index, count = run.accelerator.process_index, run.accelerator.num_processes
    prompts = run.sampler.sample(step, run.samples_per_process // images_per_prompt, index, count)
    repeated, seeds = _repeat(run, step, "samples", prompts, images_per_prompt, _own_samples(run).start)
    return sample_batch(
        chain,
        run.objective,
        repeated,
        seeds,
        run.config.training.train_batch_size,
        run.config.estimator.antithetic,
        run.estimator.uses_reward_gradient,
    )


def _own_samples(run: Run) -> slice:
    """Which of all processes' samples are this process's."""
    start = run.accelerator.process_index * run.samples_per_process
    return slice(start, start + run.samples_per_process)


def _repeat(
    run: Run, step: int, purpose: Purpose, prompts: Sequence[Prompt], images_per_prompt: int, first: int = 0
) -> tuple[list[Prompt], list[int]]:
    """Every prompt as often as it has samples, and a seed for each sample."""
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    return repeated, [derive_seed(run.config.training.seed, purpose, step, first + i) for i in range(len(repeated))]


def _gather_info(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
    """The numbers that the rewards give beside their scores, of all processes: `reward/NAME` and `heldout/NAME`."""
    names = {f"reward/{name}": values for name, values in batch.scored.logged.items()}
    if batch.heldout is not None:
        names |= {f"heldout/{name}": values for name, values in batch.heldout.logged.items()}
    # As objects, because processes need not have the same names.
    parts = run.processes.gather_objects([(names, len(batch.scored.scores))], "the rewards' own numbers")
    return join_info(parts)


def _logged_info(run: Run, info: Mapping[str, torch.Tensor], scores: torch.Tensor) -> dict[str, float]:
    """The info's means, of a weighted sum the scales that the update was divided by, and the share at the limit."""
    scales = {f"reward/{name}/scale": scale for name, scale in run.reward.scales().items()}
    satisfied = run.objective.satisfied(scores)
    return info_means(info) | scales | ({} if satisfied is None else {SATISFIED: float(satisfied.float().mean())})


def _add_gradients(
    run: Run,
    chain: DenoisingChain,
    estimator: Estimator,
    rollout: Rollout,
    advantages: torch.Tensor,
    step: int,
    draw: int,
    epoch: int,
) -> tuple[Book, torch.Tensor | None]:
    """Adds the gradient of a micro-batch's summed objective; returns its book and, if measured, its KL (B,).

    Micro-batches with the same ``draw`` get the same random numbers.
    """
    generator = _generator(run, "estimator", step, draw, epoch)
    terms = [estimator.segments(chain, run.objective, rollout, advantages, generator)]
    beta, kl = 0.0 if run.kl_penalty is None else run.kl_penalty.beta, None
    if run.kl_penalty is not None and (beta > 0 or (epoch == 0 and _measures_kl(run, step))):
        draws = _generator(run, "divergence", step, draw, epoch)
        references = reference_steps(chain, rollout.trajectory, run.kl_penalty.steps, draws)
        kl = path_kl(rollout.trajectory, references)
        terms += [kl_segments(rollout.trajectory, references, beta)] if beta > 0 else []
    bookings = []
    for term in itertools.chain(*terms):
        run.processes.keep_pace()  # begun by all at once, where they need each other's parts of the denoiser
        bookings.append(add_term(chain, run.objective, rollout, term, generator))
    return Book.of(chain, rollout, advantages, bookings), kl


def _measures_kl(run: Run, step: int) -> bool:
    """Whether the divergence is wanted now although nothing penalises it."""
    regularization = run.config.regularization
    return regularization.kl_limit is not None or is_due_after(step + 1, regularization.kl_interval)


def _generator(run: Run, purpose: Purpose, *key: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(run.config.training.seed, purpose, *key))


def all_reduce_mean_descent(parameters: Sequence[torch.nn.Parameter], num_samples: int, processes: Processes) -> None:
    """Turns the summed ascent gradients of all processes into the gradient of minus the mean reward, all-reduced once.

    ``num_samples`` are those of all processes. A flat buffer travels, because terms come from several backward passes
    and may leave parameters without gradient.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = processes.sum(flat, "the gradient") / -num_samples
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def _clip(run: Run, step: int) -> float:
    """Clips the gradient to ``max_grad_norm``; returns its norm before.

    Raises:
        DerivativeError: it is not finite.
    """
    parameters = run.chain.parameters
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, run.config.training.max_grad_norm))
    if not math.isfinite(norm):
        raise DerivativeError(
            f"Expected a finite gradient at update {step + 1}, got norm {norm}. Look at the size of the rewards, lower "
            "the learning rate, or train in bf16 or fp32. The last checkpoint, if any, is untouched."
        )
    if norm < TINY_NORM:
        norm = math.hypot(*(float(p.grad.double().norm()) for p in parameters if p.grad is not None))
    return norm


def standard_error(scores: torch.Tensor) -> float:
    """Standard error of the mean of (N,) scores; 0 for a single one."""
    # In float64, where the squares of faint scores do not vanish.
    return float(scores.double().std()) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
