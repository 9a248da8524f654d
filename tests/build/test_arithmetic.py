"""What a run does unless it is told otherwise follows from its length."""

import pytest

from rlr_peft.build import Arithmetic, arithmetic_of
from rlr_peft.config import load_config
from tests.config.loading import REQUIRED


def of(flags: str, num_prompts: int = 100, images_per_prompt: int = 1, num_processes: int = 1) -> Arithmetic:
    return arithmetic_of(load_config([*REQUIRED, *flags.split()]), num_prompts, images_per_prompt, num_processes)


@pytest.mark.parametrize(("steps", "interval"), [(1, 1), (9, 1), (25, 2), (300, 30), (4999, 499), (100_000, 500)])
def test_a_crash_costs_a_tenth_of_the_run_at_the_most(steps: int, interval: int) -> None:
    assert of(f"--max_train_steps {steps}").checkpointing_steps == interval
    assert of(f"--max_train_steps {steps} --checkpointing_steps 7").checkpointing_steps == 7


def test_epochs_count_as_the_steps_that_they_are() -> None:
    assert of("--num_train_epochs 4", num_prompts=100).max_train_steps == 100, "four images an update, each of a prompt"
    assert of("--num_train_epochs 4", num_prompts=100, images_per_prompt=4).max_train_steps == 400
    assert of("--num_train_epochs 4", num_prompts=100, images_per_prompt=4).checkpointing_steps == 40


@pytest.mark.parametrize(("processes", "size"), [(1, 4), (4, 1)])
@pytest.mark.parametrize(("steps", "images"), [(1, 2), (40, 16), (400, 160), (5000, 256)])
def test_the_base_is_evaluated_on_a_tenth_of_what_training_draws(
    steps: int, images: int, processes: int, size: int
) -> None:
    """All processes draw, so that more of them evaluate the same images."""
    flags = f"--max_train_steps {steps} --train_batch_size {size} --estimator full-bp"
    found = of(flags, num_processes=processes)
    assert found.evaluation_images == images
    assert found.evaluation_share == images / (4 * steps)
    assert steps == 1 or found.evaluation_share <= 0.1


def test_who_asks_for_images_gets_them() -> None:
    found = of("--max_train_steps 10 --num_evaluation_images 100")
    assert found.evaluation_images == 100 and found.evaluation_share == 2.5
