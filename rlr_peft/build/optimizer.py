"""The optimiser of the LoRA weights, the course of its learning rate, and the average of the weights."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_wsd_schedule

from rlr_peft.config import OptimizerArguments
from rlr_peft.config.chain import AUTO
from rlr_peft.errors import extra
from rlr_peft.estimators.base import Estimator

EXTRAS = {
    "AdamW8bit": ("bitsandbytes.optim", "quantization", "--use_8bit_adam"),
    "Lion": ("bitsandbytes.optim", "quantization", "--optimizer Lion"),
    "Prodigy": ("prodigyopt", "prodigy", "--optimizer Prodigy"),
}
"""Where optimisers are that are not torch's own: module, our extra that has it, and what asks for it."""
SETTINGS = ("initial_lr", "betas", "eps", "weight_decay")
"""What this run's config says of an optimiser's group; the rest, such as Prodigy's estimate, is its state."""


def build_optimizer(
    parameters: Iterable[nn.Parameter], arguments: OptimizerArguments, *, samples_per_step: int = 1
) -> torch.optim.Optimizer:
    """The optimiser of that name; AdamW with `use_8bit_adam` keeps its state in 8 bits (of 4096 elements or more).

    What has no knob is the class's own default, but Muon's steps are scaled to the size of AdamW's
    (https://arxiv.org/abs/2502.16982), so that learning rates of AdamW are of use. Adafactor's are not scaled
    down to the size of small weights: half of an adapter starts at zero, and would stay there.

    Args:
        parameters: the trainable ones, in an order that is the same in every run: a resumed state is matched by it.
        samples_per_step: batch size times accumulation steps times processes; multiplies the learning rate when
            `scale_lr` is set.

    Raises:
        UserError: the optimiser's package is missing.
        ValueError: Muon beside weights of convolutions, which are no matrices, or with a torch that has none.
    """
    if arguments.learning_rate == AUTO:
        learning_rate = 0.0  # not known before the first update, see training/learning_rate.py
    else:
        learning_rate = float(arguments.learning_rate) * (samples_per_step if arguments.scale_lr else 1)
    name = arguments.optimizer + ("8bit" if arguments.use_8bit_adam else "")
    optimizer_class = _optimizer_class(name)
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": arguments.adam_weight_decay}
    if name in ("AdamW", "AdamW8bit", "Prodigy"):
        options |= {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon}
    elif name == "Adafactor":
        options["eps"] = (None, 1.0)
    elif name == "Muon":
        options["adjust_lr_fn"] = "match_rms_adamw"
    with redirect_stdout(StringIO()):  # Prodigy prints that it decays weights
        optimizer: torch.optim.Optimizer = optimizer_class(parameters, **options)
    return optimizer


def _optimizer_class(name: str) -> Any:
    if name in EXTRAS:
        return getattr(extra(*EXTRAS[name]), name)
    if not hasattr(torch.optim, name):
        raise ValueError(f"optimizer: {name} expects torch 2.9 or newer, got {torch.__version__}; take another.")
    return getattr(torch.optim, name)


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, arguments: OptimizerArguments, num_training_steps: int
) -> LambdaLR:
    """The schedule of the name `lr_scheduler`, to be stepped once after every optimiser step.

    It counts optimiser steps of the whole run, so it must not go through `accelerator.prepare`, whose wrapper steps
    once for each process.
    """
    if arguments.schedule == "warmup_stable_decay":
        decay = num_training_steps - max(num_training_steps // 2, arguments.lr_warmup_steps)
        stable_decay: LambdaLR = get_wsd_schedule(
            optimizer, arguments.lr_warmup_steps, decay, num_training_steps, decay_type="linear"
        )
        return stable_decay
    scheduler: LambdaLR = get_scheduler(
        arguments.schedule,
        optimizer=optimizer,
        num_warmup_steps=arguments.lr_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=arguments.lr_num_cycles,
        power=arguments.lr_power,
    )
    return scheduler


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    lr_scheduler: LambdaLR,
    optimizer_state: Mapping[str, Any],
    lr_scheduler_state: Mapping[str, Any],
) -> None:
    """Puts both where a checkpoint left them, but with the learning rate, betas and so on that this run asks for.

    Their own `load_state_dict` would bring back those of the checkpoint, whatever the config of the resumed run says.
    The rate is the checkpoint's with `learning_rate: auto`, and where its run was asked for the same one, which may
    have been halved since.
    """
    base_rates = [
        theirs if ours in (0, group["initial_lr"]) else ours
        for ours, theirs, group in zip(
            lr_scheduler.base_lrs, lr_scheduler_state["base_lrs"], optimizer_state["param_groups"], strict=True
        )
    ]
    _restore_moments(optimizer, optimizer_state)
    lr_scheduler.load_state_dict(dict(lr_scheduler_state))
    _set_base_rates(optimizer, lr_scheduler, base_rates)


def _restore_moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """All of an optimiser's state but the settings, which stay."""
    asked = [{name: group[name] for name in SETTINGS if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, settings in zip(optimizer.param_groups, asked, strict=True):
        group.update(settings)


def _set_base_rates(optimizer: torch.optim.Optimizer, lr_scheduler: LambdaLR, base_rates: list[Any]) -> None:
    """The schedule goes on where it is, from other rates."""
    lr_scheduler.base_lrs = base_rates
    rates = [rate * factor(lr_scheduler.last_epoch) for rate, factor in zip(base_rates, lr_scheduler.lr_lambdas)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_scheduler._last_lr = rates


def build_ema(parameters: Iterable[nn.Parameter], arguments: OptimizerArguments) -> EMAModel | None:
    """diffusers' moving average of the parameters, to be stepped after every optimiser step; None without `use_ema`."""
    return EMAModel(parameters, decay=arguments.ema_decay) if arguments.use_ema else None


def restore_ema(ema: EMAModel, state: Mapping[str, Any]) -> None:
    """Puts the average where a checkpoint left it, but with the decay that this run asks for."""
    device = ema.shadow_params[0].device
    ema.load_state_dict({**state, "decay": ema.decay})
    ema.to(device)


@contextmanager
def averaged(ema: EMAModel | None, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters are their average; without one they stay as they are. Not to be nested."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


logger = logging.getLogger(__name__)

# A block has this many prompts and updates at least; the last one of a run counts from half of it.
BLOCK_PROMPTS, BLOCK_UPDATES = 32, 8
# So many successive blocks are judged together: rewards near the top differ by much in a few prompts.
WINDOW_BLOCKS = 4
# Standard errors of the difference. Halving a good rate by mistake costs little; the best of many blocks is lucky.
CLEARLY = 3.5
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

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """Of the rewards."""
        return self.total / self.count

    @property
    def deviations(self) -> float:
        """Sum of the squared deviations from the mean."""
        return max(0.0, self.squares - self.count * self.mean**2)

    def is_clearly_below(self, other: "Moments") -> bool:
        """Whether these are of a lower expectation than the others, if both have one deviation (pooled t-test).

        A few rewards may be the best because nothing went wrong in them: their own deviation says little then. Rewards
        are rounded to float32.
        """
        pooled = math.sqrt((self.deviations + other.deviations) / (self.count + other.count - 2))
        deviation = max(pooled, ROUNDING * abs(other.mean))
        return other.mean - self.mean > CLEARLY * deviation * math.sqrt(1 / self.count + 1 / other.count)


@dataclass(frozen=True)
class Block:
    """Some successive updates.

    Attributes:
        last: number of the last one.
        rewards: of the prompts of this block and those before it in its window.
        weights: mean of the weights after every update, in main memory like all that follows.
        optimizer: its state after the last update.
        estimator: the same.
    """

    last: int
    rewards: Moments
    weights: list[Tensor]
    optimizer: dict[str, Any]
    estimator: dict[str, Any]


def goes_back(arguments: OptimizerArguments, estimator: Estimator) -> bool:
    """Whether a run watches its rewards, to go back where they fall."""
    return arguments.learning_rate == AUTO or estimator.goes_back


class Rollback:
    """Watches the rewards of a run and goes back where they fall.

    The same in every process, as long as weights and rewards are.

    Args:
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
        self._earlier: list[Moments] = []
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
            "best": None if self._best is None else vars(self._best) | {"rewards": dict(vars(self._best.rewards))},
            "halvings": self.halvings,
            "update": self._update,
            "count": self._count,
            "rewards": dict(vars(self._rewards)),
            "since_best": dict(vars(self._since_best)),
            "earlier": [dict(vars(block)) for block in self._earlier],
            "sum": self._sum,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        best = state["best"]
        self._best = None if best is None else Block(**best | {"rewards": Moments(**best["rewards"])})
        self.halvings, self._update, self._count = state["halvings"], state["update"], state["count"]
        self._rewards, self._since_best = Moments(**state["rewards"]), Moments(**state["since_best"])
        self._earlier = [Moments(**block) for block in state["earlier"]]
        self._sum = list(state["sum"])

    def _start_block(self) -> None:
        self._count, self._rewards, self._sum = 0, Moments(), self._zeros()

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros(parameter.shape) for parameter in self._parameters]

    def _end_block(self) -> None:
        window = sum(self._earlier, self._rewards)
        self._earlier = [*self._earlier, self._rewards][1 - WINDOW_BLOCKS :]
        if self._best is None or window.mean >= self._best.rewards.mean:
            weights = [total / self._count for total in self._sum]
            states = _copied(self._optimizer.state_dict()), _copied(self._estimator.state_dict())
            self._best = Block(self._update, window, weights, *states)
            self._since_best = Moments()
        else:
            self._go_back_if_fallen()
        self._start_block()

    def _go_back_if_fallen(self) -> None:
        best = self._best
        if best is None:
            return
        fallen = [m.mean for m in (self._rewards, self._since_best) if m.is_clearly_below(best.rewards)]
        if not fallen:
            return
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, best.weights, strict=True):
                parameter.copy_(weight)
            for shadow, weight in zip(() if self._ema is None else self._ema.shadow_params, best.weights):
                shadow.copy_(weight)
        _restore_moments(self._optimizer, _copied(best.optimizer))
        self._estimator.load_state_dict(_copied(best.estimator))
        self.halvings += 1
        halved = [rate / 2 for rate in self._lr_scheduler.base_lrs]
        _set_base_rates(self._optimizer, self._lr_scheduler, halved)
        # The best of many blocks was lucky too: what comes now is compared with the next one, not with it again.
        self._best, self._earlier = None, []
        self._start_block()
        logger.info(
            "The reward fell from %.3g (updates up to %d) to %.3g: back to the weights of then, with half the learning "
            "rate, %.2g.",
            *(best.rewards.mean, best.last, fallen[0], self._lr_scheduler.base_lrs[0]),
        )


def _copied(state: Any) -> Any:
    """A state with its tensors copied to main memory, where they cost no GPU any."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    return type(state)(map(_copied, state)) if isinstance(state, list | tuple) else state
