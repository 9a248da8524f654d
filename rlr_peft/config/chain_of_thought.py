"""The stages that a configuration asks for, and the steps that a window of them means."""

from rlr_peft.config.arguments import ChainOfThoughtArguments, Config
from rlr_peft.stages import Stages, make_stages

AUTO = "auto"
SOURCES = ("dcot_columns", "dcot_rules", "dcot_model", "dcot_endpoint")
"""The knobs that say where stage prompts come from."""


def given_sources(arguments: ChainOfThoughtArguments) -> list[str]:
    """The names of the sources of stage prompts that are given."""
    return [name for name in SOURCES if getattr(arguments, name)]


def stages_from_config(config: Config) -> Stages | None:
    """The stages of the chain; None for a run without a Diffusive Chain-of-Thought.

    Raises:
        ValueError: names and fractions that do not fit each other.
    """
    return stages_from_arguments(config.chain_of_thought)


def stages_from_arguments(arguments: ChainOfThoughtArguments) -> Stages | None:
    """The same from their group alone."""
    if not given_sources(arguments):
        return None
    return make_stages(arguments.dcot_stages or arguments.dcot_columns, arguments.dcot_fractions)


def window_steps(window: tuple[int | str, ...], num_steps: int, stages: Stages | None) -> tuple[int, int] | None:
    """First and last step of a window, counted from the clean end; None for ``auto``, which is measured.

    Args:
        window: two steps, names of stages (from the first to the last of them), or ``auto``.
        num_steps: T.
        stages: None where the chain has none.

    Raises:
        ValueError: neither; the message says what was expected.
    """
    numbers = [part for part in window if isinstance(part, int)]
    names = [part for part in window if isinstance(part, str)]
    if numbers:
        first, last = numbers[0], numbers[-1]
        if names or len(numbers) != 2 or not 1 <= first <= last <= num_steps:
            raise ValueError(f"expected two steps a b with 1 <= a <= b <= num_inference_steps ({num_steps})")
        return first, last
    if stages is None:
        raise ValueError(
            "expected two steps a b, since stages have names only in a Chain-of-Thought (dcot_columns, dcot_rules, "
            "dcot_model or dcot_endpoint)"
        )
    if names == [AUTO]:
        return None
    if unknown := [name for name in names if name not in stages.names]:
        raise ValueError(
            f"expected two steps a b, auto, or stages of {', '.join(stages.names)} instead of {unknown[0]}"
        )
    spans = [stages.window(name, num_steps) for name in names]
    return min(span[0] for span in spans), max(span[1] for span in spans)
