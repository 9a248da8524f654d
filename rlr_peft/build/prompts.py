"""The prompts of a run as its config asks for them: read, held back, split into stages, put in order."""

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from rlr_peft.build.chain import stage_form
from rlr_peft.build.processes import Processes
from rlr_peft.chain.encodings import TextRoom, find_over_long
from rlr_peft.config import Config, ConfigError, stages_from_config
from rlr_peft.config.training import MOST_EVALUATION_IMAGES
from rlr_peft.prompt import Prompt, PromptError, as_prompts
from rlr_peft.prompts.chain_of_thought import (
    STAGE_PROMPTS_FILE,
    Decomposer,
    RememberedStages,
    decompose_by_rules,
    decompose_prompts,
)
from rlr_peft.prompts.files import prompt_lines
from rlr_peft.prompts.language_models import EndpointModel, LanguageModelDecomposer, TransformersModel
from rlr_peft.prompts.rows import Columns
from rlr_peft.prompts.sampler import MixedPromptSampler, PromptSampler, Sampler, StreamingPromptSampler
from rlr_peft.prompts.tables import DatasetSpec, dataset_prompts, hold_back, is_held_back, load_prompts, prompts_of_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPrompts:
    """The prompts of a run.

    Attributes:
        training: all training prompts, source after source; of a stream its first window.
        evaluation: unseen prompts for the comparison of base and adapter; None for no comparison.
        validation: those of ``validation_prompt``.
        sampler: which prompts an update uses.
        counts: how many of the training prompts come from each of several sources; empty for a single one.
    """

    training: list[Prompt]
    evaluation: list[Prompt] | None
    validation: list[Prompt]
    sampler: Sampler
    counts: tuple[int, ...] = ()


def read_prompts(config: Config, given: Sequence[Prompt] | None = None) -> RunPrompts:
    """Reads all prompts, without stage prompts that a decomposer makes: these come last, and may cost time.

    Args:
        given: training prompts in place of what the config names.

    Raises:
        PromptError: prompts that cannot be read.
    """
    arguments, path = config.prompts, config.validation.evaluation_prompt_path
    columns = columns_from_config(config)
    evaluation = None if path is None else _filtered(config, load_prompts(path, columns=columns))
    validation = as_prompts(config.validation.validation_prompt or ())
    if given is None and arguments.streaming:
        return _streamed(config, columns, evaluation, validation)
    if given is not None:
        prompts = list(given)
    elif len(arguments.weights) > 1:
        return _of_several_sources(config, columns, evaluation, validation)
    elif arguments.weights:
        (source,) = arguments.weights
        prompts = _of_source(config, source, columns)
    else:
        prompts = list(dataset_prompts(_dataset(config), columns, arguments.max_train_samples))
    prompts = _filtered(config, prompts)
    if arguments.validation_split_percentage is not None:
        prompts, evaluation = hold_back(prompts, arguments.validation_split_percentage)
    return RunPrompts(prompts, evaluation, validation, PromptSampler(prompts, config.training.seed))


def given_prompts(config: Config, prompts: Iterable[Prompt | str | Mapping[str, Any]]) -> tuple[Config, list[Prompt]]:
    """Training prompts that are given as objects, read as rows of a table are, and the config that says so.

    Args:
        config: its columns are those of the dictionaries; without `metadata_columns`, all other entries are metadata.
        prompts: texts, prompts, or dictionaries of a text and what else belongs to it.

    Raises:
        ConfigError: not a list of these, or an option of datasets.
        PromptError: a text that is none, a missing entry, or no text at all.
    """
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise ConfigError(
            f"prompts: expected a list of texts or of dictionaries, got {type(prompts).__name__}; a file is given as "
            "prompt_path."
        )
    rows = list(prompts)
    for number, row in enumerate(rows):
        if not isinstance(row, (str, Prompt, Mapping)):
            raise ConfigError(
                f"prompts: expected texts or dictionaries with a text, got {type(row).__name__} as number {number + 1}."
            )
    columns, limit = columns_from_config(config), config.prompts.max_train_samples
    if not columns.metadata:
        entries = dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row)
        columns = replace(columns, metadata=tuple(str(name) for name in entries if name not in columns.all))
    found = prompts_of_rows(rows, columns, limit)
    named = replace(config.prompts, prompt_path=f"a list of {len(found)} prompts", dataset_name=None, streaming=False)
    return replace(config, prompts=named), found


def with_stage_prompts(
    config: Config, prompts: RunPrompts, accelerator: Accelerator, processes: Processes
) -> RunPrompts:
    """The prompts split into stages, if a decomposer is asked for; answers of models are kept in a file.

    Raises:
        PromptError: a model that cannot be reached, or a prompt that cannot be split.
    """
    if config.prompts.streaming or not _needs_decomposer(config):
        return prompts
    # One process asks, the others get its answers: a model might answer each of them differently.
    split: list[list[Prompt] | None] = [prompts.training, prompts.evaluation, prompts.validation]
    if accelerator.is_main_process:
        decompose = _decomposer(config, accelerator.device)
        with processes.doing("splitting the prompts into stages"):
            split = [None if part is None else decompose_prompts(part, decompose) for part in split]
    training, evaluation, validation = processes.broadcast(split, "the stage prompts")
    assert training is not None and validation is not None
    return RunPrompts(training, evaluation, validation, _sampler(config, training, prompts.counts), prompts.counts)


def comparison_prompts(config: Config, device: torch.device) -> list[Prompt]:
    """The prompts for a comparison of models, with stage prompts where the config asks for them.

    Unseen ones if the config names any or holds any back, else those of training.

    Raises:
        PromptError: prompts that cannot be read or split.
    """
    path = config.validation.evaluation_prompt_path
    if path is not None:  # those of training need not be on this machine
        prompts = _filtered(config, load_prompts(path, columns=columns_from_config(config)))
    else:
        found = read_prompts(config)
        prompts = found.evaluation or found.training
    return decompose_prompts(prompts, _decomposer(config, device)) if _needs_decomposer(config) else prompts


def columns_from_config(config: Config) -> Columns:
    """What to read of tables of prompts."""
    arguments = config.prompts
    return Columns(
        caption=arguments.caption_column,
        negative_prompt=arguments.negative_prompt_column,
        stages=config.chain_of_thought.dcot_columns or (),
        metadata=arguments.metadata_columns or (),
        image=arguments.image_column,
    )


def source_shares(config: Config) -> dict[str, float]:
    """Every source of training prompts and its share of the samples; shares sum to 1."""
    weights = config.prompts.weights or dict.fromkeys(config.prompts.datasets, 1.0)
    return {source: weight / sum(weights.values()) for source, weight in weights.items()}


def warn_of_long_prompts(config: Config, pipeline: object, prompts: RunPrompts) -> None:
    """Says once how many prompts lose their end in the text encoder."""
    every = [*prompts.training, *(prompts.evaluation or ()), *prompts.validation]
    over = find_over_long(every, TextRoom.of(pipeline, config.chain.max_sequence_length))
    if over is not None:
        logger.warning("%s", over.describe())


def describe_chain_of_thought(config: Config, pipeline: DiffusionPipeline, prompts: Sequence[Prompt]) -> str | None:
    """Stages, where their prompts come from and how they condition the steps, in words; None for a run without.

    Args:
        prompts: that are drawn, with their stage prompts.
    """
    stages, arguments = stages_from_config(config), config.chain_of_thought
    if stages is None:
        return None
    if arguments.dcot_columns is not None:
        source = "columns of the prompt data"
    elif arguments.dcot_rules:
        source = "built-in rules"
    else:
        source = f"the language model `{arguments.dcot_model or arguments.dcot_endpoint_model}`"
    steps = stages.describe(config.chain.num_inference_steps)
    contrasts, checked = stage_form(config, pipeline).contrasts_among(prompts)
    if contrasts == 0:
        return f"Every step was conditioned on the prompt of its stage: {steps}. The stage prompts came from {source}."
    whole = "on the whole prompt, with the prompt without the part of its stage as negative prompt"
    if contrasts < checked:
        whole += f" (with {contrasts} of {checked} prompts; on the prompt of its stage with the others)"
    return f"Every step was conditioned {whole}: {steps}. The stages' parts came from {source}."


def _of_several_sources(
    config: Config, columns: Columns, evaluation: list[Prompt] | None, validation: list[Prompt]
) -> RunPrompts:
    """The prompts of sources with weights; what is held back of them is drawn by the same weights.

    Raises:
        PromptError: a source is left without a prompt to train on.
    """
    arguments = config.prompts
    sources = {name: _filtered(config, _of_source(config, name, columns)) for name in arguments.weights}
    percentage = arguments.validation_split_percentage
    if percentage is not None:
        # By the text, whatever its source: one that two sources hold must not be on both sides.
        held = {prompt.text for prompt in hold_back(list(itertools.chain(*sources.values())), percentage)[1]}
        unseen = {name: [prompt for prompt in source if prompt.text in held] for name, source in sources.items()}
        drawn_from = {name: source for name, source in unseen.items() if source}
        weights = [arguments.weights[name] for name in drawn_from]
        row = MixedPromptSampler(list(drawn_from.values()), weights, seed=0)  # the same for runs of all seeds
        evaluation = row.sample(0, max(MOST_EVALUATION_IMAGES, config.validation.num_evaluation_images or 0))
        sources = {name: [prompt for prompt in source if prompt.text not in held] for name, source in sources.items()}
    for name, source in sources.items():
        if not source:
            raise PromptError(
                f"validation_split_percentage: expected prompts of every source on the training side, got none of "
                f"{name}; lower it, or drop the source."
            )
    training, counts = list(itertools.chain(*sources.values())), tuple(map(len, sources.values()))
    return RunPrompts(training, evaluation, validation, _sampler(config, training, counts), counts)


def _of_source(config: Config, source: str, columns: Columns) -> list[Prompt]:
    """The prompts of one source of `prompt_path`."""
    arguments, limit = config.prompts, config.prompts.max_train_samples
    if source not in arguments.datasets:
        return load_prompts(source, limit, columns)
    spec = DatasetSpec(os.path.expanduser(source), arguments.dataset_config_name, arguments.dataset_split)
    return list(dataset_prompts(spec, columns, limit))


def _sampler(config: Config, training: list[Prompt], counts: Sequence[int]) -> Sampler:
    """The order of training: of several sources, those in their shares."""
    if not counts:
        return PromptSampler(training, config.training.seed)
    ends = list(itertools.accumulate(counts, initial=0))
    sources = [training[start:end] for start, end in itertools.pairwise(ends)]
    return MixedPromptSampler(sources, list(config.prompts.weights.values()), config.training.seed)


def _streamed(
    config: Config, columns: Columns, evaluation: list[Prompt] | None, validation: list[Prompt]
) -> RunPrompts:
    arguments = config.prompts
    percentage = arguments.validation_split_percentage
    decompose = decompose_by_rules if config.chain_of_thought.dcot_rules else None

    def stream(is_wanted: Callable[[Prompt], bool]) -> Iterator[Prompt]:
        for prompt in filter(
            is_wanted, filter(is_clean, dataset_prompts(_dataset(config), columns, arguments.max_train_samples))
        ):
            yield prompt if decompose is None else replace(prompt, stages=decompose(prompt.text))

    def is_trained_on(prompt: Prompt) -> bool:
        return percentage is None or not is_held_back(prompt, percentage)

    is_clean = None if arguments.prompt_filter is None else _word_filter(arguments.prompt_filter)

    size = arguments.shuffle_buffer_size
    training = list(itertools.islice(stream(is_trained_on), size))
    if percentage is not None:
        most = config.validation.num_evaluation_images or MOST_EVALUATION_IMAGES
        # No more than are drawn, since they are rare and the stream is read for them.
        unseen = stream(lambda prompt: not is_trained_on(prompt))
        evaluation = list(itertools.islice(unseen, min(size, most)))
    if not training or evaluation == []:
        raise ConfigError(
            f"validation_split_percentage: expected prompts on both sides of the split of {arguments.dataset_name}, "
            "got none on one; change it."
        )
    if decompose is not None:
        validation = decompose_prompts(validation, decompose)
    return RunPrompts(
        training,
        evaluation,
        validation,
        StreamingPromptSampler(lambda: stream(is_trained_on), config.training.seed, size),
    )


def _filtered(config: Config, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts without those that hold words of the config's list: published adapters carry their prompts.

    Raises:
        PromptError: no such list, an empty one, or one that leaves no prompt.
    """
    path = config.prompts.prompt_filter
    if path is None:
        return prompts
    kept = list(filter(_word_filter(path), prompts))
    if not kept:
        raise PromptError(f"prompt_filter '{path}': it leaves none of {len(prompts)} prompts; correct the list")
    if len(kept) < len(prompts):
        logger.info("%d of %d prompts are left out by %s.", len(prompts) - len(kept), len(prompts), path)
    return kept


def _word_filter(path: str) -> Callable[[Prompt], bool]:
    """Whether a prompt and its stage prompts hold none of the words and phrases in a file, one a line.

    In small or capital letters; a word counts where it stands alone, and not inside another one.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            words = [word for word, _ in prompt_lines(file, path)]
    except OSError as error:
        raise PromptError(f"prompt_filter '{path}': cannot be read: {error.strerror}") from None
    if not words:
        raise PromptError(f"prompt_filter '{path}': the file holds no word; write one a line")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    return lambda prompt: not any(pattern.search(text) for text in (prompt.text, *prompt.stages))


def _dataset(config: Config) -> DatasetSpec:
    arguments = config.prompts
    assert arguments.dataset_name is not None  # the config's checks
    return DatasetSpec(
        arguments.dataset_name, arguments.dataset_config_name, arguments.dataset_split, arguments.streaming
    )


def _needs_decomposer(config: Config) -> bool:
    arguments = config.chain_of_thought
    return arguments.dcot_rules or arguments.dcot_model is not None or arguments.dcot_endpoint is not None


def _decomposer(config: Config, device: torch.device) -> Decomposer:
    arguments, stages = config.chain_of_thought, stages_from_config(config)
    assert stages is not None
    path = Path(arguments.dcot_cache or Path(config.training.output_dir) / STAGE_PROMPTS_FILE)
    if arguments.dcot_rules:
        # Rules need no memory, but a file that a person edits is honoured.
        return RememberedStages(decompose_by_rules, path, stages.names) if arguments.dcot_cache else decompose_by_rules
    model: TransformersModel | EndpointModel
    if arguments.dcot_model is not None:
        model = TransformersModel(arguments.dcot_model, device)
    else:
        assert arguments.dcot_endpoint is not None and arguments.dcot_endpoint_model is not None
        key = os.environ.get("OPENAI_API_KEY")
        model = EndpointModel(arguments.dcot_endpoint, arguments.dcot_endpoint_model, key)
    return RememberedStages(LanguageModelDecomposer(model, stages.names), path, stages.names)
