"""What the rewards' networks cost for one image, from their architectures: memory and operations.

    python -m benchmarks.reward_costs

Memory is what `rlr-peft plan` counts: weights, and the most besides while an image is scored and, where it can be,
differentiated. The operations (a multiplication and an addition are two) are those of the part that sees the image,
forward and backward, forward alone of `unifiedreward` (before it writes) and `detector`; texts are few tokens. Nothing
is downloaded and nothing computed, all is on the meta device. Writes ``benchmarks/results/reward_costs.json``.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.machine import write_results
from rlr_peft.plan import reward_memory

NAMES = (
    *("aesthetic", "aesthetic-v2.5", "pickscore", "hpsv2", "hpsv3", "unifiedreward", "imagereward", "clipscore"),
    *("detector", "subject-consistency", "videoreward"),
)


class Operations(TorchDispatchMode):
    """Counts those of products and convolutions inside, backward passes too. (FlopCounterMode refuses `autograd.grad`.)

    Attributes:
        total: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation's own result."""
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += int(count(*args, **(kwargs or {}), out_val=result))
        return result


def cost(name: str) -> dict[str, float]:
    """Of one image of 512 x 512 pixels in fp16 (judges: bf16), of `videoreward` ten frames."""
    with Operations() as operations:
        memory = reward_memory(name, batch_size=1, dtype=torch.float16)
    assert memory is not None
    return {
        "weights_gib": round(memory.weights / 2**30, 3),
        "scoring_gib": round(memory.scoring / 2**30, 3),
        "tera_operations": round(operations.total / 1e12, 2),
    }


def main() -> None:
    """Counts, prints and writes."""
    rewards = {}
    for name in NAMES:
        rewards[name] = cost(name)
        print(name, rewards[name], flush=True)
    print(write_results("reward_costs", {"pixels": 512 * 512, "rewards": rewards}))


if __name__ == "__main__":
    main()
