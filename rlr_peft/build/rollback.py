"""`learning_rate: auto`: where the reward has clearly fallen, training goes back and on with half the rate.

How far a good first step changes the images does not depend on the reward, and is measured
(`training/learning_rate.py`). How many such steps a reward bears does depend on it, and shows only later: Adam takes
steps of about the same length whether gradients carry much or little, so that near the top of a reward too high a rate
walks away from it. Updates are watched in blocks, by the rewards that they sample anyway. Where the last block, or all
since the best one, are clearly below that, training goes on from the mean weights of the best block, with the states
that optimiser and estimator had at its end, and with half the rate.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rlr_peft.estimators.base import Estimator

logger = logging.getLogger(__name__)

# A block has this many prompts and updates at least; the last one of a run counts from half of it.
BLOCK_PROMPTS, BLOCK_UPDATES = 32, 8
# Standard errors of the difference. Halving a good rate by mistake costs little; the best of many blocks is lucky.
CLEARLY = 3.0
ROUNDING = 1e-6


@dataclass
class Moments:
    """Of the mean rewards of some updates' prompts: how many, their sum and their squares' sum."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, rewards: Tensor) -> None:
        """Takes the mean rewards of prompts (P,)."""
        rewards = rewards.double()
        self.count += len(rewards)
        self.total += float(rewards.sum())
        self.squares += float(rewards.square().sum())

    @property
    def mean(self) -> float:
        """Of the rewards."""
        return self.total / self.count

    @property
    def deviation(self) -> float:
        """Standard deviation of the rewards, which are rounded to float32."""
        variance = (self.squares - self.count * self.mean**2) / (self.count - 1)
        return max(math.sqrt(max(0.0, variance)), ROUNDING * abs(self.mean))

    def is_clearly_below(self, mean: float, count: int) -> bool:
        """Whether these are of a lower expectation than ``count`` others of that mean, if all have their deviation.

        The best block's own deviation says little: it may be the best because nothing went wrong in it.
        """
        return mean - self.mean > CLEARLY * self.deviation * math.sqrt(1 / self.count + 1 / count)


@dataclass(frozen=True)
class Block:
    """Some successive updates.

    Attributes:
        last: number of the last one.
        mean: of the prompts' rewards.
        count: of the prompts.
        weights: mean of the weights after every update, in main memory like all that follows.
        optimizer: its state after the last update.
        estimator: the same.
    """

    last: int
    mean: float
    count: int
    weights: list[Tensor]
    optimizer: dict[str, Any]
    estimator: dict[str, Any]


class Rollback:
    """Watches the rewards of a run and goes back where they fall.

    The same in every process, as long as weights and rewards are.

    Args:
        parameters: the LoRA weights.
        optimizer: of them.
        lr_scheduler: of its learning rate.
        estimator: what it has learnt belongs to the weights.
        ema: the average of the weights, which starts again from where they go back to; None without one.

    Attributes:
        halvings: how often training went back.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LambdaLR,
        estimator: Estimator,
        ema: EMAModel | None,
    ) -> None:
        self.halvings = 0
        self._parameters = parameters
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._estimator = estimator
        self._ema = ema
        self._best: Block | None = None
        self._update = self._count = 0
        self._rewards, self._since_best = Moments(), Moments()
        self._sum = self._zeros()

    def see(self, rewards: Tensor, group_size: int) -> None:
        """Takes the rewards (N,) of a finished update's samples; the weights are those after it.

        The images of a prompt, ``group_size`` neighbours, count as one: their rewards are much alike, and as samples of
        their own they would make chance look like a fall.
        """
        rewards = rewards.reshape(-1, group_size).mean(1)
        self._update += 1
        self._count += 1
        self._rewards.add(rewards)
        self._since_best.add(rewards)
        for total, parameter in zip(self._sum, self._parameters, strict=True):
            total += parameter.detach().cpu()
        if self._count >= BLOCK_UPDATES and self._rewards.count >= BLOCK_PROMPTS:
            self._end_block()

    def finish(self) -> None:
        """Goes back where the last updates of a run, if they are half a block, have fallen; else nothing changes."""
        if 2 * self._count >= BLOCK_UPDATES and 2 * self._rewards.count >= BLOCK_PROMPTS:
            self._go_back_if_fallen()

    def state_dict(self) -> dict[str, Any]:
        """All that still counts."""
        return {
            "best": None if self._best is None else dict(vars(self._best)),
            "halvings": self.halvings,
            "update": self._update,
            "count": self._count,
            "rewards": dict(vars(self._rewards)),
            "since_best": dict(vars(self._since_best)),
            "sum": self._sum,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._best = None if state["best"] is None else Block(**state["best"])
        self.halvings, self._update, self._count = state["halvings"], state["update"], state["count"]
        self._rewards, self._since_best = Moments(**state["rewards"]), Moments(**state["since_best"])
        self._sum = list(state["sum"])

    def _start_block(self) -> None:
        self._count, self._rewards, self._sum = 0, Moments(), self._zeros()

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros(parameter.shape) for parameter in self._parameters]

    def _end_block(self) -> None:
        if self._best is None or self._rewards.mean >= self._best.mean:
            weights = [total / self._count for total in self._sum]
            states = _copied(self._optimizer.state_dict()), _copied(self._estimator.state_dict())
            self._best = Block(self._update, self._rewards.mean, self._rewards.count, weights, *states)
            self._since_best = Moments()
        else:
            self._go_back_if_fallen()
        self._start_block()

    def _go_back_if_fallen(self) -> None:
        best = self._best
        if best is None:
            return
        fallen = [m.mean for m in (self._rewards, self._since_best) if m.is_clearly_below(best.mean, best.count)]
        if not fallen:
            return
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, best.weights, strict=True):
                parameter.copy_(weight)
            for shadow, weight in zip(() if self._ema is None else self._ema.shadow_params, best.weights):
                shadow.copy_(weight)
        self._optimizer.load_state_dict(_copied(best.optimizer))
        self._estimator.load_state_dict(_copied(best.estimator))
        self._halve_rate()
        self._since_best = Moments()
        self._start_block()
        logger.info(
            "The reward fell from %.3g (updates up to %d) to %.3g: back to the weights of then, with half the learning "
            "rate, %.2g.",
            *(best.mean, best.last, fallen[0], self._lr_scheduler.base_lrs[0]),
        )

    def _halve_rate(self) -> None:
        scheduler, self.halvings = self._lr_scheduler, self.halvings + 1
        scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
        rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def _copied(state: Any) -> Any:
    """A state with its tensors copied to main memory, where they cost no GPU any."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    return type(state)(map(_copied, state)) if isinstance(state, list | tuple) else state
