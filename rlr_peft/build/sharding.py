"""Denoisers that no single device holds: of every block each process keeps a part, and blocks are whole while at work.

FSDP does so too, and gathers a block in all processes at the same point of their programs: all must call the denoiser
equally often. Here they do not: `rlr` walks every sample back a random number of steps, images need not divide by the
processes, and the main one proves the adapter alone. So a block is gathered when any process comes to it, and all who
wait for others give their parts.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import nn

from rlr_peft.build.processes import Processes

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes, enough for every dtype and kernel
# The name of old, by which torch 2.13 warns.
_all_gather = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)


class ShardedDenoisers:
    """Shares the frozen weights of denoisers out over all processes; what is trained stays whole in each.

    Their forward and backward passes are as ever. Whatever is not inside a block stays whole: embeddings and the last
    projection.

    Args:
        denoisers: by name, with their adapters inside, on any device; they are moved to theirs block by block.
        processes: which give their parts from now on.

    Raises:
        ValueError: diffusers does not say what the blocks of a denoiser are.
    """

    def __init__(self, denoisers: dict[str, nn.Module], device: torch.device, processes: Processes) -> None:
        self._blocks: list[_Block] = []
        self._whole: int | None = None
        self._processes = processes
        for name, denoiser in denoisers.items():
            frozen = sum(parameter.nbytes for parameter in _frozen(denoiser))
            added = [_Block(module, device) for module in blocks_of(denoiser)]
            shared = {weight for block in added for weight in block.weights}
            for tensor in (*denoiser.parameters(), *denoiser.buffers()):
                if tensor not in shared:  # whose memory is not there now
                    tensor.data = tensor.data.to(device)
            for block in added:
                self._watch(len(self._blocks), block)
                self._blocks.append(block)
            elsewhere = sum(block.whole.numel() - block.part.numel() for block in added)
            logger.info(
                "%s: each process holds %.3g of %.3g GiB of frozen weights; the largest of %d blocks has %.3g GiB.",
                *(name, (frozen - elsewhere) / 2**30, frozen / 2**30, len(added)),
                max(block.whole.numel() for block in added) / 2**30,
            )
        processes.give_on_demand(self._give)

    def _watch(self, number: int, block: "_Block") -> None:
        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._bring(number)

        def after(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            given = [*inputs, *named.values()]
            for tensor in output if isinstance(output, tuple) else (output,):
                # What passes through unchanged belongs to an earlier block.
                if torch.is_tensor(tensor) and tensor.requires_grad and all(tensor is not other for other in given):
                    tensor.register_hook(lambda gradient: self._bring(number))

        block.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        block.module.register_forward_hook(after, with_kwargs=True)

    def _bring(self, number: int) -> None:
        """Makes this block the one that is whole here. A backward pass goes through blocks one by one, as a forward."""
        if number == self._whole:
            return
        if self._whole is not None:
            self._blocks[self._whole].leave()
        self._whole = number
        self._processes.demand(number)

    def _give(self, number: int) -> None:
        """Takes part in gathering a block, which another process may be at; all do at once."""
        block = self._blocks[number]
        block.gather()
        if number != self._whole:
            block.leave()


class _Block:
    """A block's frozen weights, as views of one buffer whose memory is there only while it is gathered.

    Tapes hold the same views: a backward pass works as soon as the memory is there again, with the same bytes.

    Attributes:
        module: the block.
        weights: its frozen ones.
        whole: all its frozen weights, in bytes.
        part: this process's share of them.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.weights = module, _frozen(module)
        sizes = _aligned_sizes(self.weights)
        count, index = torch.distributed.get_world_size(), torch.distributed.get_rank()
        share = _share(sizes, count)
        self.whole = torch.empty(count * share, dtype=torch.uint8, device=device)
        for weight, place in zip(self.weights, self.whole[: sum(sizes)].split(sizes), strict=True):
            view = place[: weight.nbytes].view(weight.dtype).view(weight.shape)
            view.copy_(weight.data)
            weight.data = view
        self.part = self.whole[index * share : (index + 1) * share].clone()
        self.leave()

    @torch.no_grad()
    def gather(self) -> None:
        """Puts all processes' parts together."""
        self.whole.untyped_storage().resize_(self.whole.numel())
        _all_gather(self.whole, self.part)

    def leave(self) -> None:
        """Gives the memory back."""
        self.whole.untyped_storage().resize_(0)


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The smallest modules that diffusers says belong together, or repeat: a model is mostly made of them.

    Raises:
        ValueError: it names none.
    """
    names = {*(denoiser._no_split_modules or ()), *(denoiser._repeated_blocks or ())}  # type: ignore[misc]
    named = {module: None for module in denoiser.modules() if type(module).__name__ in names and _frozen(module)}
    blocks = [module for module in named if not any(part in named for part in _inside(module))]
    if not blocks:
        raise ValueError(
            f"shard_denoiser: expected a denoiser of which diffusers names the blocks, got {type(denoiser).__name__}; "
            "leave --shard_denoiser out."
        )
    return blocks


def sharded_bytes(denoiser: nn.Module, processes: int) -> tuple[int, int, int]:
    """Bytes of a denoiser's blocks: of all, of each process's parts of them, and of the largest while it is whole.

    Raises:
        ValueError: diffusers does not say what the blocks are.
    """
    blocks = [_frozen(block) for block in blocks_of(denoiser)]
    shares = [_share(_aligned_sizes(weights), processes) for weights in blocks]
    return sum(weight.nbytes for weights in blocks for weight in weights), sum(shares), processes * max(shares)


def _aligned_sizes(weights: Sequence[nn.Parameter]) -> list[int]:
    return [-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in weights]


def _share(sizes: Sequence[int], processes: int) -> int:
    """Bytes of a block's buffer that each process keeps."""
    return -(-sum(sizes) // (processes * ALIGNMENT)) * ALIGNMENT


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if part is not module)


def _frozen(module: nn.Module) -> Sequence[nn.Parameter]:
    return [parameter for parameter in module.parameters() if not parameter.requires_grad]
