"""What a comparison stands on: its rewards, where its prompts come from, and all that an image of it depends on."""

from dataclasses import asdict
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.build.chain import denoiser_names
from rlr_peft.build.machine import package_versions
from rlr_peft.build.rewards import reward_settings
from rlr_peft.config import Config, stages_from_config
from rlr_peft.evaluation.comparison.comparison import MeasuredReward
from rlr_peft.evaluation.comparison.identity import file_identity, model_identity
from rlr_peft.rewards.base import Reward
from rlr_peft.rewards.combination import unique_names
from rlr_peft.rewards.registry import load_reward


def load_compared_rewards(
    config: Config, device: torch.device
) -> tuple[dict[str, tuple[str, Reward]], list[MeasuredReward]]:
    """Every reward with its spec by a short name, those of a weighted sum one by one; and how they are called."""
    arguments, settings = config.reward, reward_settings(config, device)
    trained = [arguments.reward_fn] if isinstance(arguments.reward_fn, str) else list(arguments.reward_fn)
    heldout = list(arguments.heldout_reward_fn or ())
    rewards = {
        f"reward{index}": (spec, load_reward(spec, device, settings)) for index, spec in enumerate([*trained, *heldout])
    }
    names = unique_names([reward for _, reward in rewards.values()])
    measured = [
        MeasuredReward(key, name, spec in heldout)
        for (key, (spec, _)), name in zip(rewards.items(), names, strict=True)
    ]
    return rewards, measured


def prompt_source(config: Config) -> str:
    """Where the prompts come from."""
    prompts = config.prompts
    return config.validation.evaluation_prompt_path or prompts.prompt_path or prompts.dataset_name or ""


def image_setup(config: Config, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """All but adapter, prompt and seed that an image depends on, in plain values."""
    model, stages = config.model, stages_from_config(config)
    names = (
        model.pretrained_model_name_or_path,
        model.pretrained_vae_model_name_or_path,
        model.pretrained_motion_adapter_name_or_path,
    )
    return {
        "models": [model_identity(name, model.revision, model.cache_dir) for name in names],
        "class": type(pipeline).__name__,
        "variant": model.variant,
        "precision": [model.mixed_precision, file_identity(model.bnb_quantization_config_path)],
        "kernels": [model.attention_backend, model.allow_tf32],
        "chain": {name: value for name, value in asdict(config.chain).items() if name != "eta"},
        "stages": None if stages is None else asdict(stages),
        "eta": config.validation.evaluation_eta,
        "denoisers": denoiser_names(config),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": package_versions(),
    }
