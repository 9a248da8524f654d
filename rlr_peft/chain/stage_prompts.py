"""Which text conditions which step: one for the whole chain, or one for every stage."""

from collections.abc import Iterator, Sequence

from rlr_peft.prompt import Prompt, metadata_of, negative_prompt_of, stages_of
from rlr_peft.stages import Stages


class StagePrompts:
    """Splits passes over the chain at the ends of its stages.

    Args:
        stages: None leaves the chain whole.
        num_steps: T.

    Raises:
        ValueError: a stage gets no step.
    """

    def __init__(self, stages: Stages | None, num_steps: int) -> None:
        self._steps = (range(num_steps, 0, -1),) if stages is None else stages.steps(num_steps)
        self._names = () if stages is None else stages.names

    def parts(self, prompts: Sequence[str], start: int, stop: int) -> Iterator[tuple[int, int, list[str]]]:
        """Runs of steps ``first, ..., last + 1`` that share their prompts, from ``start`` to ``stop``.

        Args:
            prompts: one per sample.
            start: first step taken.
            stop: the step after the last one taken.

        Yields:
            first, last, and one text per sample.

        Raises:
            ValueError: a prompt has another number of stage prompts than the chain has stages.
        """
        for index, steps in enumerate(self._steps):
            first, last = min(start, steps[0]), max(stop, steps[-1] - 1)
            if first > last:
                yield first, last, [self._text(prompt, index) for prompt in prompts]

    def at_step(self, prompts: Sequence[str], t: int) -> list[str]:
        """The texts that condition step t, one per sample."""
        ((_, _, texts),) = self.parts(prompts, t, t - 1)
        return texts

    def _text(self, prompt: str, index: int) -> str:
        """The prompt of a stage; one without stage prompts conditions all of them."""
        stages = stages_of(prompt)
        if not stages:
            return prompt
        if len(stages) != len(self._names):
            expected = ", ".join(self._names) or "none: the chain was built without stages"
            raise ValueError(
                f"Expected stage prompts for {expected}; got {len(stages)} with the prompt {str(prompt)!r}."
            )
        return Prompt(stages[index], negative_prompt_of(prompt), metadata=metadata_of(prompt))
