"""The configuration of a run: typed knobs, flags and YAML of the same flat names, checked before anything is loaded.

Nothing here imports torch or diffusers, so `--help` and a refusal are immediate.
"""

from rlr_peft.config.arguments import (
    ChainArguments,
    ChainOfThoughtArguments,
    CheckpointingArguments,
    Config,
    EstimatorArguments,
    HubArguments,
    LoggingArguments,
    LoraArguments,
    ModelArguments,
    OptimizerArguments,
    PromptArguments,
    RegularizationArguments,
    RewardArguments,
    TrainingArguments,
    ValidationArguments,
    config_from_dict,
    config_to_dict,
)
from rlr_peft.config.chain import stages_from_config, window_steps
from rlr_peft.config.knob import ConfigError
from rlr_peft.config.parsing import load_config, load_config_or_exit
from rlr_peft.config.yaml_files import config_to_yaml, save_config

__all__ = [
    "ChainArguments",
    "ChainOfThoughtArguments",
    "CheckpointingArguments",
    "Config",
    "ConfigError",
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
    "config_from_dict",
    "config_to_dict",
    "config_to_yaml",
    "load_config",
    "load_config_or_exit",
    "save_config",
    "stages_from_config",
    "window_steps",
]
