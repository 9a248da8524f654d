"""What can be known to be impossible of prompts and stage prompts from the configuration alone.

Each check yields one sentence per problem: what was expected, what was got, what to do.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from rlr_peft.config.arguments import Config
from rlr_peft.config.chain_of_thought import given_sources, stages_from_config

BUILTIN_SETS = (
    *("simple-animals", "simple-animals/train", "simple-animals/test"),
    *("tiny-shapes/train", "tiny-shapes/test"),
)


def check_prompts(config: Config) -> Iterator[str]:
    """Yields every problem of the sources of prompts."""
    prompts, validation = config.prompts, config.validation
    if (prompts.prompt_path is None) == (prompts.dataset_name is None):
        got = (
            "none" if prompts.prompt_path is None else f"{prompts.prompt_path} and dataset_name {prompts.dataset_name}"
        )
        yield f"prompt_path: expected one source of prompts, got {got}; give --prompt_path or --dataset_name."
    if prompts.dataset_name is None:
        for name in ("dataset_config_name", "streaming"):
            if getattr(prompts, name):
                yield f"{name}: expected only with a dataset_name, got {getattr(prompts, name)}; give --dataset_name."
    elif prompts.streaming and config.training.max_train_steps is None:
        yield (
            "max_train_steps: expected a number with streaming, since the length of an epoch is not known, got none; "
            "give --max_train_steps."
        )
    if prompts.negative_prompt_column is not None and config.chain.negative_prompt is not None:
        yield (
            f"negative_prompt_column: expected only without negative_prompt, got {prompts.negative_prompt_column} and "
            f"{config.chain.negative_prompt!r}; drop one of the two."
        )
    if prompts.validation_split_percentage is not None and validation.evaluation_prompt_path is not None:
        yield (
            f"validation_split_percentage: expected only without evaluation_prompt_path, got "
            f"{prompts.validation_split_percentage:g} and {validation.evaluation_prompt_path}; drop one of the two."
        )
    for name, spec in (
        ("prompt_path", prompts.prompt_path),
        ("evaluation_prompt_path", validation.evaluation_prompt_path),
    ):
        if spec is not None and spec not in BUILTIN_SETS and not os.path.isfile(os.path.expanduser(spec)):
            yield (
                f"{name}: expected an existing text file, .jsonl, .csv or .parquet, or one of "
                f"{', '.join(BUILTIN_SETS)}, "
                f"got {spec}; check the path, seen from {Path.cwd()}."
            )


def check_chain_of_thought(config: Config) -> Iterator[str]:
    """Yields every problem of the stages and their prompts."""
    arguments, steps = config.chain_of_thought, config.chain.num_inference_steps
    sources = given_sources(arguments)
    if len(sources) > 1:
        yield f"{sources[0]}: expected one source of stage prompts, got {' and '.join(sources)}; keep one."
        return
    for name in ("dcot_stages", "dcot_fractions", "dcot_cache"):
        if getattr(arguments, name) is not None and not sources:
            yield (
                f"{name}: expected only with a source of stage prompts, got none; give --dcot_columns, --dcot_rules, "
                "--dcot_model or --dcot_endpoint."
            )
            return
    if (arguments.dcot_endpoint is None) != (arguments.dcot_endpoint_model is None):
        yield (
            f"dcot_endpoint_model: expected together with dcot_endpoint, got {arguments.dcot_endpoint_model} and "
            f"{arguments.dcot_endpoint}; give both or neither."
        )
    if config.prompts.streaming and ("dcot_model" in sources or "dcot_endpoint" in sources):
        yield (
            f"{sources[0]}: expected dcot_columns or dcot_rules with streaming, got {sources[0]}; split the prompts of "
            "a dataset that is not streamed."
        )
    try:
        stages = stages_from_config(config)
        if stages is not None:
            stages.steps(steps)
    except ValueError as error:
        yield f"dcot_fractions: {error}, got stages {_stage_words(config)}; change --dcot_stages or --dcot_fractions."
        return
    if stages is not None and arguments.dcot_rules and stages.names != ("coarse", "mid", "fine"):
        yield (
            f"dcot_stages: expected coarse mid fine with dcot_rules, got {' '.join(stages.names)}; drop "
            "--dcot_stages, or take the stage prompts from columns or a model."
        )
    if stages is not None and arguments.dcot_columns is None and "prompt" in stages.names:
        yield (
            "dcot_stages: expected other names than prompt, which the file of stage prompts calls the whole text, got "
            f"{' '.join(stages.names)}; rename the stage."
        )
    columns = arguments.dcot_columns
    if stages is not None and columns is not None and len(columns) != stages.count:
        yield (
            f"dcot_columns: expected one column for each of {stages.count} stages, got {' '.join(columns)}; change "
            "--dcot_columns or --dcot_stages."
        )


def _stage_words(config: Config) -> str:
    arguments = config.chain_of_thought
    names = arguments.dcot_stages or arguments.dcot_columns or ("the default",)
    fractions = arguments.dcot_fractions or ("equal",)
    return f"{' '.join(names)} and fractions {' '.join(map(str, fractions))}"
