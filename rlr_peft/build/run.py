"""Builds everything that a run needs: the cheap parts first, so that a mistake costs seconds.

The config names the base, the reward and the prompts; in a notebook they may be given as objects instead.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR

from rlr_peft.build.chain import (
    attach_adapters,
    build_training_chain,
    check_trajectory,
    evaluation_chain,
)
from rlr_peft.build.machine import derive_seed, prepare_machine
from rlr_peft.build.optimizer import Rollback, averaged, build_ema, build_lr_scheduler, build_optimizer, goes_back
from rlr_peft.build.pipeline import (
    check_image_sizes,
    compile_denoisers,
    denoisers_of,
    described_by,
    load_pipeline,
    load_reward_decoder,
    prepare_pipeline,
)
from rlr_peft.build.processes import PATIENCE, Processes
from rlr_peft.build.prompts import given_prompts, read_prompts, warn_of_long_prompts, with_stage_prompts
from rlr_peft.build.reporting import as_config_error
from rlr_peft.build.rewards import load_rewards, measure_scales, name_of_object, name_reward
from rlr_peft.build.sharding import ShardedDenoisers
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.families import Family, family_of
from rlr_peft.config import Config, ConfigError, stages_from_config
from rlr_peft.config.chain import AUTO
from rlr_peft.config.training import LONGEST_UNSAVED, MOST_EVALUATION_IMAGES, SHARE
from rlr_peft.errors import extra
from rlr_peft.estimators.base import Estimator, RunShape, build_estimator
from rlr_peft.estimators.kl import KLPenalty
from rlr_peft.estimators.objective import DecodedReward
from rlr_peft.lora import AdapterFiles, check_adapter, check_adapter_saves, check_kohya, find_adapter, start_from
from rlr_peft.prompt import Prompt, as_prompts, texts_of
from rlr_peft.prompts.sampler import Sampler
from rlr_peft.rewards.base import Reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arithmetic:
    """The derived numbers of a run.

    Attributes:
        samples_per_update: samples of all processes in one update; of one micro-batch each where those are measured.
        max_train_steps: updates of the whole run.
        checkpointing_steps: updates between two checkpoints.
        evaluation_images: images on which base and adapter are compared.
    """

    samples_per_update: int
    max_train_steps: int
    checkpointing_steps: int
    evaluation_images: int

    @property
    def evaluation_share(self) -> float:
        """Images of the base's evaluation over those that the run trains on."""
        return self.evaluation_images / (self.max_train_steps * self.samples_per_update)


@dataclass(frozen=True)
class Run:
    """The parts of one training run.

    Attributes:
        config: what was asked for.
        accelerator: device and trackers.
        processes: how those of the run exchange what they need of each other.
        pipeline: the base with the trainable adapter inside.
        family: what is particular to the pipeline's class.
        chain: the pipeline as the chain that is trained.
        reward: what is raised.
        heldout: what is only measured, one reward or several as one; None without.
        objective: decodes and scores.
        estimator: turns rollouts into gradients.
        kl_penalty: how the divergence from the base is measured; None if never.
        prompts: all training prompts; of a stream its first window.
        sampler: which prompts an update uses.
        evaluation_prompts: prompts of the comparison of base and adapter; None for no comparison.
        validation_prompts: prompts drawn while training.
        optimizer: of the LoRA weights.
        lr_scheduler: its learning rate.
        ema: the average of the LoRA weights, which is evaluated and saved in their place; None without one.
        rollback: goes back with half the rate where the reward falls; None where nothing watches the rewards.
        arithmetic: the derived numbers.
        given: names of what came as a Python object, which no config can load: `pipeline`, `reward`, `prompts`,
            `estimator`.
    """

    config: Config
    accelerator: Accelerator
    processes: Processes
    pipeline: DiffusionPipeline
    family: Family
    chain: DenoisingChain
    reward: Reward
    heldout: Reward | None
    objective: DecodedReward
    estimator: Estimator
    kl_penalty: KLPenalty | None
    prompts: list[Prompt]
    sampler: Sampler
    evaluation_prompts: list[Prompt] | None
    validation_prompts: list[Prompt]
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    ema: EMAModel | None
    rollback: Rollback | None
    arithmetic: Arithmetic
    given: Mapping[str, str]

    @property
    def output_dir(self) -> Path:
        """Folder that receives everything."""
        return Path(self.config.training.output_dir)

    @property
    def method(self) -> str:
        """Name of the estimator: the config's, or that of the object which took its place."""
        return self.given.get("estimator", self.config.estimator.estimator)

    @property
    def method_in_words(self) -> str:
        """The terms of the gradient at present, and that samples come without noise where they do."""
        terms = self.estimator.describe(self.objective.has_gradient)
        return f"{terms}; images drawn without noise" if self.draws_without_noise else terms

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a process in one update: the config's, or as many as the estimator asks for."""
        asked = self.config.training.gradient_accumulation_steps
        return asked if isinstance(asked, int) else self.estimator.micro_batches

    @property
    def samples_per_process(self) -> int:
        """Samples of one process in one update."""
        return self.config.training.train_batch_size * self.gradient_accumulation_steps

    @property
    def num_images_per_prompt(self) -> int:
        """Images of a prompt in the next update: the config's, or 1 where they are not compared."""
        return _images_per_prompt(self.config, self.estimator, self.chain, self.objective)

    @property
    def samples_per_update(self) -> int:
        """Samples of all processes in one update."""
        return self.samples_per_process * self.accelerator.num_processes

    @property
    def weights(self) -> list[torch.Tensor]:
        """All that optimiser steps move: the LoRA weights, and their average where there is one."""
        return [*self.chain.parameters, *(self.ema.shadow_params if self.ema is not None else ())]

    @property
    def draws_without_noise(self) -> bool:
        """Whether the next update's samples are drawn without noise: where nobody asked for it or needs it.

        A deterministic sampler is then what base and adapter are looked at with, too.
        """
        chain = self.config.chain
        is_asked_for = chain.step_kind != AUTO or chain.noise_window is not None
        if is_asked_for or self.kl_penalty is not None or self.config.validation.evaluation_eta > 0:
            return False
        return not self.estimator.for_reward(self.objective.has_gradient).needs_noise

    @property
    def update_chain(self) -> DenoisingChain:
        """What the next update samples and differentiates: `chain`, or the same without noise."""
        return self._noiseless_chain if self.draws_without_noise else self.chain

    @cached_property
    def _noiseless_chain(self) -> DenoisingChain:
        return self.chain.at(step_kind="ode")

    @property
    def denoiser_evaluations(self) -> int:
        """Of this process so far, for training; a guided pair counts once."""
        noiseless = self._noiseless_chain.denoiser_evaluations if self.config.chain.step_kind == AUTO else 0
        return self.chain.denoiser_evaluations + noiseless

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the pipeline has the weights that are evaluated and saved: with an average, that. Not nested."""
        return averaged(self.ema, self.chain.parameters)


def build_run(
    config: Config,
    pipeline: DiffusionPipeline | None = None,
    reward: Callable[..., Any] | None = None,
    prompts: Iterable[Prompt | str | Mapping[str, Any]] | None = None,
    estimator: Estimator | None = None,
) -> Run:
    """Loads prompts and rewards, then the pipeline, attaches the adapter and prepares the training state.

    What is given as an object takes the place of what the config names, and `Run.config` names it as far as it has a
    name: the pipeline's `name_or_path`, the function's `module:name`.

    Args:
        pipeline: the base, loaded; it gets the adapter. Its models are frozen and moved to the run's device, and it
            keeps its number format.
        reward: a function or object as behind `--reward_fn file.py:NAME`, or a `Reward`.
        prompts: texts, or dictionaries with a text and more, as rows of a `.jsonl` file.
        estimator: turns rollouts into gradients in place of the config's.

    Raises:
        ConfigError: the base, the adapter, the chain, the optimiser or the budgets cannot be built as asked for, an
            object of a wrong type, or the launcher and accelerate disagree on the number of processes.
        PromptError, RewardError: prompts or rewards that cannot be loaded.
    """
    if not isinstance(config, Config):
        raise ConfigError(f"config: expected a Config of rlr_peft.config, got {type(config).__name__}.")
    given = {}
    if pipeline is not None:
        with as_config_error():
            config = replace(config, model=described_by(pipeline, config.model, config.lora.denoisers))
        given["pipeline"] = config.model.pretrained_model_name_or_path
    training_prompts = None
    if prompts is not None:
        config, training_prompts = given_prompts(config, prompts)
        given["prompts"] = str(config.prompts.prompt_path)
    if reward is not None:
        config = name_reward(config, reward)
        given["reward"] = name_of_object(reward)
    if estimator is not None:
        if not isinstance(estimator, Estimator):
            raise ConfigError(f"estimator: expected an rlr_peft.Estimator, got {type(estimator).__name__}.")
        given["estimator"] = name_of_object(estimator)
    run_prompts = read_prompts(config, training_prompts)
    if pipeline is None:
        check_image_sizes(config)
    initial = _initial_adapter(config)
    accelerator = _accelerator(config)
    shards = _shards(config, accelerator)
    processes = Processes(accelerator)
    prepare_machine(config.model, accelerator.device)
    set_seed(derive_seed(config.training.seed, "process", accelerator.process_index) % 2**32)
    samples = config.training.fixed_samples * accelerator.num_processes
    if estimator is None:
        with as_config_error():
            shape = RunShape(
                config.chain.num_inference_steps,
                stages_from_config(config),
                samples,
                measures_batch=config.training.gradient_accumulation_steps == AUTO,
            )
            estimator = build_estimator(config.estimator, shape)
    trained_reward, heldout = load_rewards(config, accelerator.device, reward)
    known = [*run_prompts.training, *(run_prompts.evaluation or ())]
    for part in (*trained_reward.parts, *(heldout.parts if heldout is not None else ())):
        part.check_prompts(texts_of(known), [dict(prompt.metadata) for prompt in as_prompts(known)])
    run_prompts = with_stage_prompts(config, run_prompts, accelerator, processes)
    with as_config_error():
        if pipeline is None:
            pipeline = load_pipeline(config.model, accelerator.device, shards_denoisers=shards)
        else:
            prepare_pipeline(pipeline, config.model, accelerator.device, shards_denoisers=shards)
        family = family_of(pipeline, config.lora.denoisers)
        parameters = attach_adapters(config, pipeline, family)
        if initial is not None:
            start_from(pipeline, initial)
        if config.lora.output_kohya_format:
            check_kohya(pipeline)
        if config.model.torch_compile:
            compile_denoisers(getattr(pipeline, name) for name in family.denoisers)
        if shards:
            ShardedDenoisers(denoisers_of(pipeline), accelerator.device, processes)
        decoder = load_reward_decoder(config.model, pipeline, accelerator.device)
        chain = build_training_chain(config, pipeline, decoder)
        check_trajectory(config, chain)
        if config.validation.evaluation_scheduler is not None:
            evaluation_chain(config, chain)
        chain.check_negative_prompts(run_prompts.training[:1])
        for prompts in (run_prompts.training, run_prompts.evaluation or (), run_prompts.validation):
            chain.check_images(prompts)
        check_adapter_saves(pipeline)
        optimizer = build_optimizer(parameters, config.optimizer, samples_per_step=samples)
    warn_of_long_prompts(config, pipeline, run_prompts)
    warning = chain.last_step_warning()
    if warning is not None:
        logger.warning("%s", warning)
    decode_batch_size = config.reward.decode_batch_size or config.training.train_batch_size
    objective = DecodedReward(chain, trained_reward, decode_batch_size, heldout, config.reward.reward_limit)
    images_per_prompt = _images_per_prompt(config, estimator, chain, objective)
    arithmetic = arithmetic_of(config, len(run_prompts.training), images_per_prompt, accelerator.num_processes)
    measure_scales(trained_reward, chain, objective, run_prompts.sampler, config, processes)
    lr_scheduler = build_lr_scheduler(optimizer, config.optimizer, arithmetic.max_train_steps)
    ema = build_ema(chain.parameters, config.optimizer)
    watches = goes_back(config.optimizer, estimator)
    return Run(
        config=config,
        accelerator=accelerator,
        processes=processes,
        pipeline=pipeline,
        family=family,
        chain=chain,
        reward=trained_reward,
        heldout=heldout,
        objective=objective,
        estimator=estimator,
        kl_penalty=_kl_penalty(config),
        prompts=run_prompts.training,
        sampler=run_prompts.sampler,
        evaluation_prompts=run_prompts.evaluation,
        validation_prompts=run_prompts.validation,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        ema=ema,
        rollback=Rollback(chain.parameters, optimizer, lr_scheduler, estimator, ema) if watches else None,
        arithmetic=arithmetic,
        given=given,
    )


def _initial_adapter(config: Config) -> AdapterFiles | None:
    """Found and looked at before a base is loaded."""
    if config.lora.init_adapter is None:
        return None
    files = find_adapter(config.lora.init_adapter, token=config.hub.hub_token, cache_dir=config.model.cache_dir)
    check_adapter(files)
    return files


def _kl_penalty(config: Config) -> KLPenalty | None:
    regularization = config.regularization
    measured = regularization.kl_interval is not None or regularization.kl_limit is not None
    if regularization.kl_beta == 0 and not measured:
        return None
    return KLPenalty(regularization.kl_beta, regularization.kl_steps)


def _accelerator(config: Config) -> Accelerator:
    output_dir, tracker = config.training.output_dir, config.logging.report_to
    if tracker not in ("none", "all"):
        extra(tracker, tracker, f"--report_to {tracker}")
    for sharding in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{sharding}", "false").lower() == "true":
            raise ConfigError(
                f"Expected processes that shard nothing by accelerate's config, got {sharding}, which would share out "
                "nothing here. Launch with `accelerate launch --multi_gpu`; for a base that is too large take "
                "--shard_denoiser, --bnb_quantization_config_path nf4 or --offload."
            )
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(output_dir, logging_dir=f"{output_dir}/{config.logging.logging_dir}"),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"Expected {launched} processes, as launched, to find each other; accelerate sees "
            f"{accelerator.num_processes}. On a machine without GPU set ACCELERATE_USE_CPU=1 before launching."
        )
    return accelerator


def _shards(config: Config, accelerator: Accelerator) -> bool:
    """Whether denoisers are shared out over the processes.

    Raises:
        ConfigError: there is one process alone.
    """
    if config.training.shard_denoiser and accelerator.num_processes == 1:
        raise ConfigError(
            "shard_denoiser: expected several processes that share the denoiser, got one; launch them with "
            "`accelerate launch --multi_gpu --num_processes N`, or leave --shard_denoiser out."
        )
    return config.training.shard_denoiser


def _images_per_prompt(config: Config, estimator: Estimator, chain: DenoisingChain, objective: DecodedReward) -> int:
    is_given = config.training.num_images_per_prompt != AUTO
    is_mirrored = config.estimator.antithetic  # a pair is of one prompt
    compared = is_given or is_mirrored or estimator.compares_images(chain, objective.has_gradient)
    return config.training.compared_images if compared else 1


def arithmetic_of(config: Config, num_prompts: int, images_per_prompt: int, num_processes: int = 1) -> Arithmetic:
    """What follows from the sizes in the config, from the number of prompts, of images of each, and of processes."""
    training = config.training
    samples = training.fixed_samples * num_processes
    steps_per_epoch = math.ceil(num_prompts / (samples // images_per_prompt))
    steps = training.max_train_steps or training.num_train_epochs * steps_per_epoch
    # An image to look at costs less than a sample, which is also differentiated.
    images = max(2, min(MOST_EVALUATION_IMAGES, steps * samples // SHARE))
    return Arithmetic(
        samples_per_update=samples,
        max_train_steps=steps,
        checkpointing_steps=config.checkpointing.checkpointing_steps or max(1, min(LONGEST_UNSAVED, steps // SHARE)),
        evaluation_images=config.validation.num_evaluation_images or images,
    )
