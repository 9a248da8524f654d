"""From the config to rewards: one or several, each on a scale that is first measured on images of the base."""

import math

import torch

from rlr_peft.build.processes import Processes
from rlr_peft.build.randomness import derive_seed
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.config import Config
from rlr_peft.estimators.objective import DecodedReward
from rlr_peft.estimators.sampling import sample_batch
from rlr_peft.prompts.sampler import Sampler
from rlr_peft.rewards.base import Reward
from rlr_peft.rewards.combination import MIN_SCORES, HeldoutRewards, Term, WeightedRewards
from rlr_peft.rewards.model_reward import DTYPES, ModelFiles, ModelSettings
from rlr_peft.rewards.registry import RewardSettings, load_reward
from rlr_peft.rewards.remote import RemoteSettings


def load_rewards(config: Config, device: torch.device) -> tuple[Reward, Reward | None]:
    """What is trained on, and what is only measured, if anything is.

    Raises:
        RewardError: one of them cannot be loaded.
    """
    arguments, settings = config.reward, reward_settings(config, device)
    heldout = [load_reward(spec, device, settings) for spec in arguments.heldout_reward_fn or ()]
    minimums = arguments.reward_minimum or {}
    if isinstance(arguments.reward_fn, str) and not minimums:
        reward: Reward = load_reward(arguments.reward_fn, device, settings)
    else:
        weights = {arguments.reward_fn: 1.0} if isinstance(arguments.reward_fn, str) else arguments.reward_fn
        terms = [Term(load_reward(spec, device, settings), w, minimums.get(spec)) for spec, w in weights.items()]
        reward = WeightedRewards(terms, arguments.reward_scaling, arguments.reward_minimum_penalty)
    return reward, heldout[0] if len(heldout) == 1 else HeldoutRewards(heldout) if heldout else None


def reward_settings(config: Config, device: torch.device) -> RewardSettings:
    """How the config says that rewards are held and servers asked."""
    arguments = config.reward
    return RewardSettings(
        ModelSettings(
            device,
            DTYPES[arguments.reward_dtype],
            arguments.offload_rewards,
            ModelFiles(arguments.reward_model_path, config.model.cache_dir),
        ),
        RemoteSettings(
            timeout=arguments.reward_server_timeout,
            retries=arguments.reward_server_retries,
            batch_size=arguments.reward_server_batch_size,
        ),
    )


def measure_scales(
    reward: WeightedRewards,
    chain: DenoisingChain,
    objective: DecodedReward,
    sampler: Sampler,
    config: Config,
    processes: Processes,
) -> None:
    """Gives a weighted sum its first scales, from images of the base that no update will see.

    Every process measures the same images; the main process's numbers count, should the last digits differ.
    """
    if not reward.needs_scales:
        return
    training = config.training
    group_size = training.num_images_per_prompt
    num_images = max(config.estimator.calibration_samples, MIN_SCORES)
    prompts = sampler.sample(0, math.ceil(num_images / group_size))
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    seeds = [derive_seed(training.seed, "reward_scale", i) for i in range(len(repeated))]
    batch = sample_batch(chain, objective, repeated, seeds, training.train_batch_size, differentiate=False)
    reward.observe(batch.info)
    reward.load_state_dict(processes.broadcast(reward.state_dict(), "the rewards' first scales"))
