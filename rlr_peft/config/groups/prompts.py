"""Knobs of the prompts, and of those of every stage."""

from dataclasses import dataclass

from rlr_peft.config.knob import knob


@dataclass(frozen=True)
class PromptArguments:
    """Prompts: what is drawn while training"""

    prompt_path: str | None = knob(
        None,
        "Training prompts: a `.txt` file with one a line, a `.jsonl`, `.csv` or `.parquet` file, or a built-in set: "
        "`simple-animals` (also `/train` and `/test`), `tiny-shapes/train` or `tiny-shapes/test`.",
        found="prompts",
    )
    dataset_name: str | None = knob(
        None, "Training prompts from a dataset in place of prompt_path: Hub id or local folder.", found="dataset"
    )
    dataset_config_name: str | None = knob(None, "Configuration of the dataset, where it has several.", found="words")
    dataset_split: str = knob("train", "Split of the dataset that holds the training prompts.", found="words")
    streaming: bool = knob(False, "Read the dataset as it comes instead of preparing all of it first.")
    shuffle_buffer_size: int = knob(
        1000,
        "Prompts of a streamed dataset that are shuffled among each other, window by window.",
        unit="prompts",
        at_least=1,
        at_most=10**7,
    )
    caption_column: str = knob(
        "text", "Column of the prompts in a dataset or a .jsonl, .csv or .parquet file.", found="words"
    )
    negative_prompt_column: str | None = knob(
        None, "Column of the prompts' own negative prompts, in place of negative_prompt.", found="words"
    )
    metadata_columns: tuple[str, ...] | None = knob(
        None, "Columns that rewards get as the `metadata` of a prompt; null means none.", found="words"
    )
    max_train_samples: int | None = knob(
        None, "Use only the first so many training prompts; null means all.", unit="prompts", at_least=1, at_most=10**9
    )
    validation_split_percentage: float | None = knob(
        None,
        "Share of the prompts that is never trained on, but used to compare base and adapter; null means none.",
        unit="percent",
        above=0,
        below=100,
    )


@dataclass(frozen=True)
class ChainOfThoughtArguments:
    """Diffusive Chain-of-Thought: a prompt for every stage of the chain (off unless a source of them is given)"""

    dcot_columns: tuple[str, ...] | None = knob(
        None,
        "Columns of the stage prompts in the prompt data, noise first, for example `coarse mid fine`.",
        found="words",
    )
    dcot_rules: bool = knob(False, "Split prompts into coarse, mid and fine by built-in rules.")
    dcot_model: str | None = knob(
        None, "Split prompts with a text-generation model of transformers: Hub id or local folder.", found="model"
    )
    dcot_endpoint: str | None = knob(
        None,
        "Split prompts with a model behind an OpenAI-compatible URL, `http://localhost:8000/v1`; the key is read from "
        "the environment variable OPENAI_API_KEY.",
    )
    dcot_endpoint_model: str | None = knob(None, "Name of the model behind dcot_endpoint.")
    dcot_cache: str | None = knob(
        None,
        "JSONL file of stage prompts, to read and edit; null means `stage_prompts.jsonl` in output_dir.",
    )
    dcot_stages: tuple[str, ...] | None = knob(
        None,
        "Names of the stages, noise first; null means those of dcot_columns, else coarse, mid and fine.",
        found="words",
    )
    dcot_fractions: tuple[float, ...] | None = knob(
        None, "Share of the steps of every stage, noise first, with sum 1; null means equal parts.", unit="fraction"
    )
