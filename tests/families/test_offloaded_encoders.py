"""Text encoders that wait in host memory: the same embeddings, with one block at a time on the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlr_peft.chain import DenoisingChain, largest_block, offload_models, offload_text_encoders, text_encoders
from tests.families.table import CASES, PROMPTS, load
from tests.pipelines import chain_over

CPU = torch.device("cpu")
OF_IMAGES_AND_VIDEOS = ["sd-epsilon", "sdxl", "sd3", "flux", "qwen-image", "pixart-sigma", "sana", "z-image", "wan-2.1"]


def embeddings(chain: DenoisingChain) -> list[Tensor]:
    """What the pipeline's own call was handed."""
    chain.encode(PROMPTS)
    found: list[Tensor] = []
    for joined in chain._driver._encode_prompt._joined.values():
        for entry in joined:
            found += [entry] if torch.is_tensor(entry) else entry or []
    return found


@pytest.mark.parametrize("name", OF_IMAGES_AND_VIDEOS)
def test_the_embeddings_are_the_same_bit_for_bit(name: str, folder_of: Callable[[str], str]) -> None:
    options = {"num_inference_steps": 2, **CASES[name].options}
    expected = embeddings(chain_over(load(folder_of(name)), **options))
    for offload in (offload_text_encoders, offload_models):
        pipeline = load(folder_of(name))
        places = [p.data_ptr() for encoder in text_encoders(pipeline).values() for p in encoder.parameters()]
        offload(pipeline, CPU)
        found = embeddings(chain_over(pipeline, **options))
        assert found and len(found) == len(expected) and all(map(torch.equal, found, expected))
        # the weights in host memory are those that were there, and nothing was copied back
        assert places == [p.data_ptr() for encoder in text_encoders(pipeline).values() for p in encoder.parameters()]
        assert pipeline._execution_device == CPU


class OnlyCopies(TorchDispatchMode):
    """Inside, nothing but a copy to the device may look at weights in host memory, as on a real device.

    Args:
        encoders: their weights are at home now.

    Attributes:
        peak: bytes of weights away from home, at the most.
        lookers: operations that saw one that is at home.
    """

    def __init__(self, encoders: list[torch.nn.Module]) -> None:
        super().__init__()
        self._weights = [tensor for encoder in encoders for tensor in (*encoder.parameters(), *encoder.buffers())]
        self._home = {tensor.data_ptr() for tensor in self._weights}
        self.peak = 0
        self.lookers: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor) and leaf.numel()]
        if any(tensor.data_ptr() in self._home for tensor in tensors):
            self.lookers.add(str(func))
        self.peak = max(self.peak, sum(w.nbytes for w in self._weights if w.data_ptr() not in self._home))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", OF_IMAGES_AND_VIDEOS)
def test_one_block_at_a_time_is_on_the_device(name: str, folder_of: Callable[[str], str]) -> None:
    pipeline = load(folder_of(name))
    encoders = list(text_encoders(pipeline).values())
    chain = chain_over(pipeline, num_inference_steps=2, **CASES[name].options)
    offload_text_encoders(pipeline, CPU)
    with OnlyCopies(encoders) as mode:
        chain.encode(["a prompt that is new"])
    assert mode.lookers <= {"aten._to_copy.default", "aten.detach.default", "aten.clone.default"}
    assert 0 < mode.peak <= largest_block(pipeline) * 1.1
    assert mode.peak < sum(p.nbytes for encoder in encoders for p in encoder.parameters())
