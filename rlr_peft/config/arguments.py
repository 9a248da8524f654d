"""Every knob of a run, group by group.

A field's name is its flag (`--rank 4`) and its YAML name (`rank: 4`); names are unique over all groups, so both stay
flat. A group's docstring is its title in `--help`. Ranges are declared with the knobs, combinations in `checks.py` and
its neighbours.
"""

from dataclasses import dataclass

from rlr_peft.config.groups.chain import ChainArguments
from rlr_peft.config.groups.estimator import EstimatorArguments, RegularizationArguments
from rlr_peft.config.groups.model import LoraArguments, ModelArguments
from rlr_peft.config.groups.output import CheckpointingArguments, HubArguments, LoggingArguments, ValidationArguments
from rlr_peft.config.groups.prompts import ChainOfThoughtArguments, PromptArguments
from rlr_peft.config.groups.reward import RewardArguments
from rlr_peft.config.groups.training import OptimizerArguments, TrainingArguments

__all__ = [
    "ChainArguments",
    "ChainOfThoughtArguments",
    "CheckpointingArguments",
    "Config",
    "EstimatorArguments",
    "HubArguments",
    "LoggingArguments",
    "LoraArguments",
    "ModelArguments",
    "OptimizerArguments",
    "PromptArguments",
    "RegularizationArguments",
    "RewardArguments",
    "TrainingArguments",
    "ValidationArguments",
]


@dataclass(frozen=True)
class Config:
    """One run, fully resolved: hashable, immutable, checked by `load_config`."""

    model: ModelArguments
    lora: LoraArguments
    chain: ChainArguments
    prompts: PromptArguments
    chain_of_thought: ChainOfThoughtArguments
    reward: RewardArguments
    estimator: EstimatorArguments
    regularization: RegularizationArguments
    training: TrainingArguments
    optimizer: OptimizerArguments
    validation: ValidationArguments
    checkpointing: CheckpointingArguments
    hub: HubArguments
    logging: LoggingArguments
