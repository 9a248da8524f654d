"""One update: sample, score, estimate the gradient, all-reduce it once, clip, step."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlr_peft.build.processes import Processes
from rlr_peft.build.randomness import Purpose, derive_seed
from rlr_peft.chain.adjoint import DerivativeError
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.estimator import EstimatorReport
from rlr_peft.estimators.kl_penalty import KLPenalty, accumulate_kl_penalty
from rlr_peft.rewards.combination import ON_FIRST_SCALES, WeightedRewards
from rlr_peft.rewards.scores import info_means, join_info
from rlr_peft.training.progress import is_due_after
from rlr_peft.training.rollouts import Batch, sample_batch
from rlr_peft.training.run import Run

# Squares of entries much below this vanish in float32, and with them the norm.
TINY_NORM = 1e-15


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        rewards: of the samples of all processes, (samples_per_update,); a weighted sum is that on its first scales.
        heldout: held-out scores of the same samples; None without a held-out reward.
        kl: estimates of the samples' divergence from the base in nats, (samples_per_update,); None if not measured.
        reports: of all processes' micro-batches, in the last inner epoch.
        gradient_norm: of the mean reward's gradient, before clipping, in the last inner epoch.
        info: means of the numbers that the rewards give beside their scores, `reward/NAME` and `heldout/NAME`.
    """

    rewards: torch.Tensor
    heldout: torch.Tensor | None
    kl: torch.Tensor | None
    reports: list[EstimatorReport]
    gradient_norm: float
    info: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """The update's numbers for the logs."""
        metrics = {
            "reward": float(self.rewards.mean()),
            "reward_se": standard_error(self.rewards),
            "loss": -float(self.rewards.mean()),
            "gradient_norm": self.gradient_norm,
            "first_order_steps": statistics.mean(report.first_order_steps for report in self.reports),
        }
        if self.heldout is not None:
            metrics |= {"heldout": float(self.heldout.mean()), "heldout_se": standard_error(self.heldout)}
        if self.kl is not None:  # no standard error: the samples of a micro-batch share their drawn steps
            metrics["kl"] = float(self.kl.mean())
        # A term that is drawn, or that a random K leaves no room, need not be in every micro-batch.
        for term in dict.fromkeys(term for report in self.reports for term in report.gradient_norms):
            norms = [report.gradient_norms.get(term, 0.0) for report in self.reports]
            metrics[f"gradient_norm/{term}"] = statistics.fmean(norms)
        for name in dict.fromkeys(name for report in self.reports for name in report.metrics):
            metrics[name] = statistics.fmean(report.metrics[name] for report in self.reports if name in report.metrics)
        return metrics | self.info


def calibrate(run: Run, step: int) -> None:
    """Measures the terms' variances on samples of their own; every process measures the same ones."""
    arguments, training = run.config.estimator.calibration, run.config.training
    assert arguments is not None, "only methods with calibration knobs ask for one"
    group_size = training.num_images_per_prompt
    # Single samples are replayed, and dropout's masks depend on the size of the batch.
    micro_batch_size = 1 if run.chain.denoiser.training else training.train_batch_size
    prompts = run.sampler.sample(step, math.ceil(arguments.calibration_samples / group_size))
    repeated, seeds = _repeat(run, step, "calibration", prompts)
    batch = sample_batch(
        run.chain,
        run.objective,
        repeated,
        seeds,
        micro_batch_size,
        lambda rewards, _: leave_one_out(rewards, group_size),
    )
    run.estimator.calibrate(run.chain, batch.rollouts, arguments.calibration_decay)
    # Sums on GPUs differ in their last digits, which may tip the choice of K: all go by the main process's numbers.
    run.estimator.load_state_dict(run.processes.broadcast(run.estimator.state_dict(), "the calibration"))


def take_update(run: Run, step: int) -> Update:
    """One or more optimiser steps on the samples of ``step``.

    Raises:
        RewardError: bad scores; nothing has been updated.
        DerivativeError: the gradient is not finite; this optimiser step has not been taken.
    """
    batch = _sample(run, step)
    rewards = run.processes.gather(batch.rewards, "the rewards")
    scale = run.reward_scale.scale(rewards) if run.reward_scale is not None else 1.0
    info = _info(run, batch)
    kl: torch.Tensor | None = None
    memories: list[Any] = []
    for epoch in range(run.estimator.inner_epochs):
        reports, divergence = _accumulate(run, step, epoch, batch, scale)
        kl = kl if divergence is None or epoch > 0 else run.processes.gather(divergence, "the divergences")
        memories += [report.memory for report in reports if report.memory is not None]
        norm = _optimizer_step(run, step, scale)
    run.lr_scheduler.step()
    memories, reports = _of_all(run, memories, reports)
    run.estimator.remember(memories)
    heldout = None if batch.heldout is None else run.processes.gather(batch.heldout, "the held-out scores")
    is_sum = isinstance(run.reward, WeightedRewards)
    shown = info.pop(f"reward/{ON_FIRST_SCALES}") if is_sum else rewards  # a single reward's own `total` is its info
    update = Update(shown, heldout, kl, reports, norm, _logged_info(run, info))
    if isinstance(run.reward, WeightedRewards):
        # Only now: all that the update scored, mirrored samples too, is divided by the scales of earlier ones.
        run.reward.observe({name.removeprefix("reward/"): values for name, values in info.items()})
    return update


def _of_all(run: Run, memories: list[Any], reports: list[EstimatorReport]) -> tuple[list[Any], list[EstimatorReport]]:
    """Memories and reports of all processes, in their order."""
    own = memories, [replace(report, memory=None) for report in reports]
    parts = run.processes.gather_objects([own], "the estimator's numbers")
    return [memory for part, _ in parts for memory in part], [report for _, part in parts for report in part]


def _info(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
    """The numbers that the rewards give beside their scores, of all processes: `reward/NAME` and `heldout/NAME`."""
    names = {f"reward/{name}": values for name, values in batch.info.items()}
    names |= {f"heldout/{name}": values for name, values in batch.heldout_info.items()}
    # As objects, because processes need not have the same names.
    parts = run.processes.gather_objects([(names, len(batch.rewards))], "the rewards' own numbers")
    return join_info(parts)


def _logged_info(run: Run, info: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The info's means and, of a weighted sum, the scales that the update was divided by."""
    means = info_means(info)
    if isinstance(run.reward, WeightedRewards) and run.reward.needs_scales:
        means |= {f"reward/{name}/scale": scale for name, scale in run.reward.scales().items()}
    return means


def _accumulate(
    run: Run, step: int, epoch: int, batch: Batch, scale: float
) -> tuple[list[EstimatorReport], torch.Tensor | None]:
    """Adds this process's gradients of one inner epoch; returns reports and, if measured, the divergence."""
    penalty = _kl_penalty(run, step, epoch, scale)
    reports, divergences = [], []
    for i, rollout in enumerate(batch.rollouts):
        key = (step, run.accelerator.process_index * len(batch.rollouts) + i, epoch)
        reports.append(run.estimator.accumulate(run.chain, run.objective, rollout, _generator(run, "estimator", *key)))
        if penalty is not None:
            generator = _generator(run, "divergence", *key)
            divergences.append(accumulate_kl_penalty(run.chain, rollout, penalty, generator))
    return reports, torch.cat(divergences) if divergences else None


def _kl_penalty(run: Run, step: int, epoch: int, scale: float) -> KLPenalty | None:
    """What to do about the divergence now: penalise it in every inner epoch, or measure it in the first."""
    if run.kl_penalty is None:
        return None
    interval = run.config.regularization.kl_interval
    is_limited = run.config.regularization.kl_limit is not None
    measures = epoch == 0 and (is_limited or is_due_after(step + 1, interval))
    if run.kl_penalty.beta == 0 and not measures:
        return None
    # The whole gradient is divided by the rewards' scale; the penalty's weight is relative to the scaled rewards.
    return replace(run.kl_penalty, beta=run.kl_penalty.beta * scale)


def _sample(run: Run, step: int) -> Batch:
    """This process's samples of a step; a pure function of the config's seed, the weights and the step."""
    accelerator, training = run.accelerator, run.config.training
    index, count = accelerator.process_index, accelerator.num_processes
    prompts = run.sampler.sample(step, run.arithmetic.prompts_per_process, index, count)
    repeated, seeds = _repeat(run, step, "samples", prompts, first=index * run.arithmetic.samples_per_process)

    def advantages(rewards: torch.Tensor, texts: list[str]) -> torch.Tensor:
        every = run.processes.gather_objects(texts, "the prompts"), run.processes.gather(rewards, "the rewards")
        run.estimator.observe(*every)
        return run.estimator.advantages(rewards, texts, training.num_images_per_prompt)

    return sample_batch(
        run.chain,
        run.objective,
        repeated,
        seeds,
        training.train_batch_size,
        advantages,
        run.config.estimator.antithetic,
        run.estimator.uses_reward_gradient,
    )


def _repeat(
    run: Run, step: int, purpose: Purpose, prompts: Sequence[str], first: int = 0
) -> tuple[list[str], list[int]]:
    """Every prompt as often as it has samples, and a seed for each sample."""
    training = run.config.training
    repeated = [prompt for prompt in prompts for _ in range(training.num_images_per_prompt)]
    return repeated, [derive_seed(training.seed, purpose, step, first + i) for i in range(len(repeated))]


def _generator(run: Run, purpose: Purpose, *key: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(run.config.training.seed, purpose, *key))


def _optimizer_step(run: Run, step: int, scale: float) -> float:
    """All-reduces, clips, and takes the optimiser step; returns the gradient's norm before clipping."""
    parameters = run.chain.parameters
    to_mean_descent(parameters, run.arithmetic.samples_per_update * scale, run.processes)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, run.config.training.max_grad_norm))
    if not math.isfinite(norm):
        raise DerivativeError(
            f"Expected a finite gradient at update {step + 1}, got norm {norm}. Look at the size of the rewards, lower "
            "the learning rate, or train in bf16 or fp32. The last checkpoint, if any, is untouched."
        )
    if norm < TINY_NORM:
        norm = math.hypot(*(float(p.grad.double().norm()) for p in parameters if p.grad is not None))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def to_mean_descent(parameters: Sequence[torch.nn.Parameter], divisor: float, processes: Processes) -> None:
    """Turns the summed ascent gradients of all processes into the gradient of minus the mean reward, all-reduced once.

    ``divisor`` is the number of samples of all processes, times the scale of the rewards if they are normalised.

    A flat buffer travels, because terms come from several backward passes and may leave parameters without gradient.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = processes.sum(flat, "the gradient") / -divisor
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def standard_error(scores: torch.Tensor) -> float:
    """Standard error of the mean of (N,) scores; 0 for a single one."""
    # In float64, where the squares of faint scores do not vanish.
    return float(scores.double().std()) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
