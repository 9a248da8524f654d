"""From the config to rewards: one or several, each on a scale that is first measured on images of the base."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rlr_peft.build.machine import derive_seed
from rlr_peft.build.processes import Processes
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.stepped_pipeline import DEFAULT_FPS
from rlr_peft.config import Config, ConfigError
from rlr_peft.estimators.objective import DecodedReward, sample_batch
from rlr_peft.prompts.sampler import Sampler
from rlr_peft.rewards.base import Reward, refuse_latents
from rlr_peft.rewards.callables import reward_of
from rlr_peft.rewards.combination import MIN_SCORES, HeldoutRewards, Term, WeightedRewards
from rlr_peft.rewards.model_files import ModelFiles
from rlr_peft.rewards.model_reward import ModelSettings, weights_dtype
from rlr_peft.rewards.registry import RewardSettings, load_reward
from rlr_peft.rewards.remote import RemoteSettings
from rlr_peft.rewards.vlm_endpoint import JudgeSettings


def name_reward(config: Config, given: Callable[..., Any]) -> Config:
    """The config with the name of a reward that is given as an object.

    Raises:
        ConfigError: it is neither a function nor a callable object.
    """
    if not callable(given):
        raise ConfigError(
            f"reward: expected a function of images and prompts, or a Reward, got {type(given).__name__}; a name or an "
            "address is given as reward_fn."
        )
    return replace(config, reward=replace(config.reward, reward_fn=name_of_object(given)))


def load_rewards(
    config: Config, device: torch.device, given: Callable[..., Any] | None = None
) -> tuple[Reward, Reward | None]:
    """What is trained on, and what is only measured, if anything is.

    Args:
        given: the object that the config names as `reward_fn`, see `name_reward`.

    Raises:
        RewardError: one of them cannot be loaded.
    """
    arguments, settings = config.reward, reward_settings(config, device)
    heldout = [load_reward(spec, settings) for spec in arguments.heldout_reward_fn or ()]
    for one in heldout:
        refuse_latents(one, "a held-out reward gets")
    minimums = arguments.reward_minimum or {}
    weights = {arguments.reward_fn: 1.0} if isinstance(arguments.reward_fn, str) else arguments.reward_fn
    trained = {}
    for spec in weights:
        if given is None:
            trained[spec] = load_reward(spec, settings)
        else:
            trained[spec] = given if isinstance(given, Reward) else reward_of(name_of_object(given), given, device)
    if isinstance(arguments.reward_fn, str) and not minimums:
        reward = trained[arguments.reward_fn]
    else:
        terms = [Term(trained[spec], weight, minimums.get(spec)) for spec, weight in weights.items()]
        reward = WeightedRewards(terms, arguments.reward_scaling, arguments.reward_minimum_penalty)
    return reward, heldout[0] if len(heldout) == 1 else HeldoutRewards(heldout) if heldout else None


def name_of_object(given: object) -> str:
    """`module:name` of a function, a class or an object's class; of what a notebook or script holds the name alone."""
    if isinstance(given, Reward):
        return given.name
    named = given if hasattr(given, "__qualname__") else type(given)
    return named.__qualname__ if named.__module__ == "__main__" else f"{named.__module__}:{named.__qualname__}"


def reward_settings(config: Config, device: torch.device) -> RewardSettings:
    """How the config says that rewards are held and servers asked."""
    arguments = config.reward
    return RewardSettings(
        ModelSettings(
            device,
            weights_dtype(arguments.reward_dtype, device),
            arguments.offload_rewards,
            ModelFiles(arguments.reward_model_path, config.model.cache_dir),
            config.chain.fps or DEFAULT_FPS,
        ),
        RemoteSettings(
            timeout=arguments.reward_server_timeout,
            retries=arguments.reward_server_retries,
            batch_size=arguments.reward_server_batch_size,
        ),
        JudgeSettings(arguments.vlm_question, arguments.vlm_answers, arguments.vlm_endpoint),
    )


def measure_scales(
    reward: Reward,
    chain: DenoisingChain,
    objective: DecodedReward,
    sampler: Sampler,
    config: Config,
    processes: Processes,
) -> None:
    """Gives a reward that divides by scales its first ones, from images of the base that no update will see.

    Every process measures the same images; the main process's numbers count, should the last digits differ.
    """
    if not reward.scales():
        return
    training = config.training
    group_size = training.compared_images
    num_images = max(config.estimator.calibration_samples, MIN_SCORES)
    prompts = sampler.sample(0, math.ceil(num_images / group_size))
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    seeds = [derive_seed(training.seed, "reward_scale", i) for i in range(len(repeated))]
    batch = sample_batch(chain, objective, repeated, seeds, training.train_batch_size, differentiate=False)
    reward.learn(batch.scored.raw)
    reward.load_state_dict(processes.broadcast(reward.state_dict(), "the rewards' first scales"))
