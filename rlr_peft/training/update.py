"""One update: sample, score, estimate the gradient, all-reduce it once, clip, step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rlr_peft.chain.adjoint import DerivativeError
from rlr_peft.estimators.rlr import EstimatorReport
from rlr_peft.training.rollouts import Batch, sample_batch
from rlr_peft.training.run import Run
from rlr_peft.training.seeds import Purpose, derive_seed


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        rewards: of the samples of all processes, (samples_per_update,).
        heldout: held-out scores of the same samples; None without a held-out reward.
        reports: of this process's micro-batches.
        gradient_norm: of the mean reward's gradient, before clipping.
    """

    rewards: torch.Tensor
    heldout: torch.Tensor | None
    reports: list[EstimatorReport]
    gradient_norm: float

    def metrics(self) -> dict[str, float]:
        """The update's numbers for the logs."""
        plan = self.reports[0].plan
        metrics = {
            "reward": float(self.rewards.mean()),
            "reward_se": standard_error(self.rewards),
            "loss": -float(self.rewards.mean()),
            "gradient_norm": self.gradient_norm,
            "first_order_steps": plan.first_order_steps,
        }
        if self.heldout is not None:
            metrics |= {"heldout": float(self.heldout.mean()), "heldout_se": standard_error(self.heldout)}
        for term in self.reports[0].gradient_norms:
            norms = [report.gradient_norms.get(term, 0.0) for report in self.reports]
            metrics[f"gradient_norm/{term}"] = sum(norms) / len(norms)
        return metrics


def sample_for(
    run: Run,
    step: int,
    purpose: Purpose,
    num_prompts: int,
    micro_batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> Batch:
    """The batch of one process for a step; a pure function of the config's seed and the arguments."""
    training = run.config.training
    group_size = training.num_images_per_prompt
    samples = num_prompts * group_size
    first = process_index * samples
    seeds = [derive_seed(training.seed, purpose, step, first + i) for i in range(samples)]
    prompts = run.sampler.sample(step, num_prompts, process_index, num_processes)
    return sample_batch(run.chain, run.objective, prompts, seeds, micro_batch_size, group_size)


def calibrate(run: Run, step: int) -> None:
    """Measures the per-step variances on samples of their own; every process measures the same ones."""
    arguments, training = run.config.estimator, run.config.training
    num_prompts = math.ceil(arguments.calibration_samples / training.num_images_per_prompt)
    # Single samples are replayed, and dropout's masks depend on the size of the batch.
    micro_batch_size = 1 if run.chain.denoiser.training else training.train_batch_size
    batch = sample_for(run, step, "calibration", num_prompts, micro_batch_size)
    run.estimator.calibrate(run.chain, batch.rollouts, arguments.calibration_decay)


def take_update(run: Run, step: int) -> Update:
    """One optimiser step on the samples of ``step``.

    Raises:
        RewardError: bad scores; nothing has been updated.
        DerivativeError: the gradient is not finite; nothing has been updated.
    """
    accelerator, arithmetic, training = run.accelerator, run.arithmetic, run.config.training
    index, count = accelerator.process_index, accelerator.num_processes
    prompts = arithmetic.prompts_per_process
    batch = sample_for(run, step, "samples", prompts, training.train_batch_size, index, count)
    reports = []
    for i, rollout in enumerate(batch.rollouts):
        micro_batch = index * len(batch.rollouts) + i
        seed = derive_seed(training.seed, "estimator", step, micro_batch)
        generator = torch.Generator().manual_seed(seed)
        reports.append(run.estimator.accumulate(run.chain, run.objective, rollout, generator))
    parameters = run.chain.parameters
    to_mean_descent(parameters, arithmetic.samples_per_update, accelerator)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm))
    if not math.isfinite(norm):
        raise DerivativeError(
            f"Expected a finite gradient at optimiser step {step}, got norm {norm}. Lower the learning rate, or train "
            "in bf16 or fp32; the last checkpoint is untouched."
        )
    run.optimizer.step()
    run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.estimator.remember(gather_object([entry for report in reports for entry in report.block_norms]))
    rewards = accelerator.gather(batch.rewards)
    heldout = None if batch.heldout is None else accelerator.gather(batch.heldout)
    return Update(rewards, heldout, reports, norm)


def to_mean_descent(parameters: Sequence[torch.nn.Parameter], samples: int, accelerator: Accelerator) -> None:
    """Turns the summed ascent gradients of all processes into the gradient of minus the mean reward, all-reduced once.

    A flat buffer travels, because terms come from several backward passes and may leave parameters without gradient.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = accelerator.reduce(flat, reduction="sum") / -samples
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def standard_error(scores: torch.Tensor) -> float:
    """Standard error of the mean of (N,) scores; 0 for a single one."""
    return float(scores.std()) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
