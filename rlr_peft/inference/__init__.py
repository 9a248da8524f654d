"""Drawing images with what was trained, where a pipeline's own call does not suffice."""

from rlr_peft.inference.chain_of_thought import DiffusiveChainOfThought

__all__ = ["DiffusiveChainOfThought"]
