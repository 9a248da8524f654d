"""What is drawn while training: where prompts come from, and what of it cannot be together."""

import difflib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlr_peft.config.knob import Group, knob
from rlr_peft.errors import nearest_path
from rlr_peft.files import prompt_sets

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config

BUILTIN_SETS = (
    *("simple-animals", "simple-animals/train", "simple-animals/test"),
    *("tiny-shapes/train", "tiny-shapes/test"),
    *prompt_sets(),
)
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Endings of files of prompts with columns."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_dataset(source: str) -> bool:
    """Whether a source of prompts reads like a dataset of the Hub, `OWNER/NAME`, and nothing here has that name."""
    is_id = _HUB_ID.fullmatch(source) is not None and not source.lower().endswith((".txt", *TABLES))
    return is_id and source not in BUILTIN_SETS and not os.path.exists(source)


def nearest_source(source: str) -> str | None:
    """What a mistyped source of prompts most likely means: a built-in set or an existing path; None for no idea."""
    return (*difflib.get_close_matches(source, BUILTIN_SETS, n=1, cutoff=0.8), nearest_path(source))[0]


LEAST_SHARE = 0.001
"""Of one of several sources of prompts; smaller ones would hardly ever be drawn."""


@dataclass(frozen=True)
class PromptArguments(Group):
    """Prompts: what is drawn while training"""

    prompt_path: dict[str, float] | str | None = knob(
        None,
        "Training prompts: a `.txt` file (one a line), a table (`.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`) or a "
        "built-in set such as `scenes`; or several sources, `{NAME: WEIGHT, ...}`.",
        found="prompts",
    )
    dataset_name: str | None = knob(
        None, "Training prompts from a dataset in place of prompt_path: Hub id or local folder.", found="dataset"
    )
    dataset_config_name: str | None = knob(None, "Configuration of the dataset, where it has several.", found="words")
    dataset_split: str = knob("train", "Split of the dataset that holds the training prompts.", found="words")
    streaming: bool = knob(False, "Read the dataset row by row instead of preparing all of it first.")
    shuffle_buffer_size: int = knob(
        1000,
        "Prompts of a streamed dataset that are shuffled among each other, window by window.",
        unit="prompts",
        within="[1, 1e7]",
    )
    caption_column: str = knob("text", "Column of the prompts in a dataset or a table.", found="words")
    negative_prompt_column: str | None = knob(
        None, "Column of the prompts' own negative prompts, in place of negative_prompt.", found="words"
    )
    metadata_columns: tuple[str, ...] | None = knob(
        None, "Columns that rewards get as the `metadata` of a prompt; null means none.", found="words"
    )
    image_column: str | None = knob(
        None,
        "Column of pictures, for bases that edit or animate one: paths relative to the folder of the table, or the "
        "images of a dataset.",
        found="words",
    )
    prompt_filter: str | None = knob(
        None,
        "Word list, a UTF-8 file with a word or phrase a line: prompts that hold one of them, in small or capital "
        "letters, are left out of training and evaluation.",
    )
    max_train_samples: int | None = knob(
        None,
        "Use only the first so many training prompts, of several sources those of each; null means all.",
        unit="prompts",
        within="[1, 1e9]",
    )
    validation_split_percentage: float | None = knob(
        None,
        "Share of the prompts that is never trained on, but used to compare base and adapter; null means none.",
        unit="percent",
        within="(0, 100)",
    )

    @property
    def weights(self) -> dict[str, float]:
        """Every source of `prompt_path` and its weight; 1 for a single one, none for a dataset."""
        if isinstance(self.prompt_path, str):
            return {self.prompt_path: 1.0}
        return self.prompt_path or {}

    @property
    def datasets(self) -> list[str]:
        """Those of all sources that are datasets: Hub ids and local folders."""
        if self.dataset_name is not None:
            return [self.dataset_name]
        several = self.prompt_path if isinstance(self.prompt_path, dict) else {}
        folders = [source for source in several if os.path.isdir(os.path.expanduser(source))]
        return [source for source in several if is_hub_dataset(source) or source in folders]

    def check(self, config: "Config") -> Iterator[str]:
        evaluation = config.validation.evaluation_prompt_path
        if (self.prompt_path is None) == (self.dataset_name is None):
            got = "none" if self.prompt_path is None else f"{self.prompt_path} and dataset_name {self.dataset_name}"
            yield f"prompt_path: expected one source of prompts, got {got}; give --prompt_path or --dataset_name."
        config_name = self.dataset_config_name
        if config_name and not self.datasets:
            yield f"dataset_config_name: expected only with a dataset, got {config_name}; give --dataset_name."
        if self.streaming and self.dataset_name is None:
            yield "streaming: expected only with a dataset_name, got True; give --dataset_name."
        elif self.streaming and config.training.max_train_steps is None:
            yield (
                "max_train_steps: expected a number with streaming, since the length of an epoch is not known, got "
                "none; give --max_train_steps."
            )
        size = config.chain.resolution, config.chain.height, config.chain.width
        if self.image_column is not None and size[0] is None and None in size[1:]:
            yield (
                f"image_column: expected a size that the pictures of {self.image_column} are fitted to, got none; give "
                "--resolution, or --height and --width."
            )
        if self.negative_prompt_column is not None and config.chain.negative_prompt is not None:
            yield (
                f"negative_prompt_column: expected only without negative_prompt, got {self.negative_prompt_column} and "
                f"{config.chain.negative_prompt!r}; drop one of the two."
            )
        if self.validation_split_percentage is not None and evaluation is not None:
            yield (
                f"validation_split_percentage: expected only without evaluation_prompt_path, got "
                f"{self.validation_split_percentage:g} and {evaluation}; drop one of the two."
            )
        total = sum(self.weights.values())
        if self.prompt_path is not None and not (
            0 < total < math.inf and min(self.weights.values()) >= LEAST_SHARE * total
        ):
            yield (
                f"prompt_path: expected weights above 0, none of them below {LEAST_SHARE} of their sum, got "
                f"{dict(self.weights)}; write `{{NAME: WEIGHT, ...}}`, for example `{{simple-animals: 3, scenes: 1}}`."
            )
        for source in self.datasets:
            path = os.path.expanduser(source)
            near = source if os.path.isfile(path) else None if os.path.exists(path) else nearest_source(source)
            # What lies here decides nothing of a single name, nor of an OWNER/NAME that only half of a path is like.
            if near is not None and (near == source or 1 < len(Path(path).parts) == len(Path(near).parts)):
                name = "dataset_name" if self.dataset_name is not None else "prompt_path"
                hint = f"--prompt_path {near}" if near in BUILTIN_SETS or os.path.isfile(near) else near
                yield (
                    f"{name}: expected a Hub id or an existing folder, got {source}, seen from {Path.cwd()}; write "
                    f"{hint} if you mean that."
                )
        named = dict.fromkeys(self.weights, "prompt_path")
        for spec, name in (named if evaluation is None else named | {evaluation: "evaluation_prompt_path"}).items():
            is_dataset = name == "prompt_path" and spec in self.datasets
            if spec not in BUILTIN_SETS and not is_dataset and not os.path.isfile(os.path.expanduser(spec)):
                near = nearest_source(spec)
                hint = "check the path." if near is None else f"write {near} if you mean that."
                yield (
                    f"{name}: expected an existing text file, .jsonl, .csv or .parquet, or one of "
                    f"{', '.join(BUILTIN_SETS)}, got {spec}, seen from {Path.cwd()}; {hint}"
                )
