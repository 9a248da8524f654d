"""Over-long prompts are counted as the real tokenizers count."""

import pytest
from diffusers import CogVideoXPipeline, FluxPipeline, LTXPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import T5Tokenizer

from rlr_peft.chain import MAX_CHECKED, TextRoom, default_sequence_length, find_over_long
from rlr_peft.prompt import Prompt, as_prompts
from tests.pipelines import PROMPT_LENGTH, letter_tokenizer


def test_prompts_and_stage_prompts_beyond_the_limit() -> None:
    fits = "a" * (PROMPT_LENGTH - 2)  # one token a letter, and start and end
    staged = Prompt("a" * 99, stages=("short", "b" * 30, fits))
    over = find_over_long(
        as_prompts([fits, fits + "a", "a b", staged, fits + "a"]), TextRoom([letter_tokenizer()], None)
    )
    assert over is not None
    assert (over.count, over.limit, over.example_tokens, over.example) == (2, PROMPT_LENGTH, 32, "b" * 30)
    assert over.checked == 5  # different texts; of a prompt with stages only these are encoded
    assert over.describe().startswith("2 of 5 prompts and stage prompts are longer than the 16 tokens")


def test_repeated_prompts_do_not_hide_those_behind_them() -> None:
    over = find_over_long(as_prompts(["a"] * MAX_CHECKED + ["b" * 40]), TextRoom([letter_tokenizer()], None))
    assert over is not None and (over.count, over.checked) == (1, 2)


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        (StableDiffusion3Pipeline, 256),
        (FluxPipeline, 512),
        (CogVideoXPipeline, 226),
        (LTXPipeline, 128),
        (StableDiffusionPipeline, None),
    ],
)
def test_what_pipelines_see_by_themselves(pipeline: type, expected: int | None) -> None:
    assert default_sequence_length(pipeline.__new__(pipeline)) == expected


def test_nothing_to_report() -> None:
    assert find_over_long([Prompt("a" * (PROMPT_LENGTH - 2))], TextRoom([letter_tokenizer()], None)) is None
    assert find_over_long([Prompt("a" * 1000)], TextRoom([], None)) is None


@pytest.mark.parametrize(("given", "expected"), [(None, None), (24, 24)])
def test_the_roomiest_text_encoder_decides(given: int | None, expected: int | None) -> None:
    roomy = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("a", -1.0)], extra_ids=0)
    over = find_over_long([Prompt("a" * 30)], TextRoom([letter_tokenizer(), roomy], given))
    assert (None if over is None else over.limit) == expected
