"""One resumable optimisation loop for the autoencoder, the judges and the denoiser.

Nothing random survives from one step to the next: every step seeds its own generator from (seed, step, rank). Hence a
run that was stopped and resumed ends in the same weights, bit for bit, as one that was not.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn

LossFunction = Callable[[int, torch.Generator], torch.Tensor]
"""(step, generator of this step and rank) -> scalar loss."""


@dataclass(frozen=True)
class LoopSettings:
    """Knobs of one training run."""

    steps: int
    """Optimiser steps in all."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises linearly from 0."""
    decay_share: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    average_decay: float = 0.999
    """Decay per step of the exponential moving average of the weights, which is what gets exported."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    log_every: int = 50
    """Steps between two lines of the log."""
    seed: int = 0
    """Seed of the data order and of all noise."""
    stop_after: int | None = None
    """End this call after so many steps, as an interruption would (for tests); the run can then be resumed."""


def process_rank() -> int:
    """Number of this process among those of torchrun; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def train(module: nn.Module, loss_function: LossFunction, settings: LoopSettings, folder: Path) -> bool:
    """Train ``module`` in place, resuming from ``folder/checkpoint.pt`` where there is one.

    At the end, or when the run is cut by ``stop_after``, the checkpoint holds weights, averaged weights, optimiser
    state, step and seconds spent.

    Returns:
        Whether all steps are done.
    """
    rank, processes = process_rank(), process_count()
    if processes > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = [parameter.detach().clone() for parameter in parameters]
    step, seconds = 0, 0.0
    path = folder / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        step, seconds = state["step"], state["seconds"]
    folder.mkdir(parents=True, exist_ok=True)

    def checkpoint() -> None:
        if rank == 0:
            state = {"weights": module.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
            save_atomically({**state, "step": step, "seconds": seconds + time.monotonic() - start}, path)

    module.train()
    start, first_step, total = time.monotonic(), step, torch.zeros(())
    while step < settings.steps and (settings.stop_after is None or step - first_step < settings.stop_after):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate_factor(step, settings)
        generator = torch.Generator().manual_seed(_mix(settings.seed, step, rank))
        loss = loss_function(step, generator)
        loss.backward()
        if processes > 1:
            _average_gradients(parameters, processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # The average must forget the random start: early on it follows the weights more closely.
        decay = min(settings.average_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        total += loss.detach()
        step += 1
        if rank == 0 and step % settings.log_every == 0:
            spent = seconds + time.monotonic() - start
            _log(folder, {"step": step, "loss": round(float(total) / settings.log_every, 5), "seconds": round(spent)})
            total.zero_()
        if step % settings.checkpoint_every == 0:
            checkpoint()
    checkpoint()
    if processes > 1:
        distributed.barrier()
    return step >= settings.steps


def load_averaged_weights(module: nn.Module, folder: Path) -> None:
    """Put the averaged weights of a checkpoint into ``module``."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    module.load_state_dict(state["weights"])
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, averaged in zip(parameters, state["average"], strict=True):
            parameter.copy_(averaged)


def training_effort(folder: Path) -> dict[str, int]:
    """Steps done so far and wall time spent on them, in seconds, interruptions not counted."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True, mmap=True)
    return {"steps": state["step"], "seconds": round(state["seconds"])}


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """``torch.save`` that leaves either the old file or the whole new one, whenever it is killed."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _rate_factor(step: int, settings: LoopSettings) -> float:
    warmup = (step + 1) / max(1, settings.warmup_steps)
    decay = (settings.steps - step) / max(1.0, settings.decay_share * settings.steps)
    return min(1.0, warmup, decay)


def _mix(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 64 + rank


def _average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= processes
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def _log(folder: Path, record: dict[str, Any]) -> None:
    print(f"{folder.name}: {json.dumps(record)}", flush=True)
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
