"""Builds a run as training does, but without weights, measures its phases and adds its memory up."""

from collections.abc import Mapping
from typing import Any

import torch

from rlr_peft.build.chain import (
    attach_adapters,
    build_chain,
    build_training_chain,
    evaluation_chain,
)
from rlr_peft.build.optimizer import goes_back
from rlr_peft.build.pipeline import DTYPES, check_reward_decoder, own_reward_decoder
from rlr_peft.build.reporting import as_config_error
from rlr_peft.build.sharding import sharded_bytes
from rlr_peft.byte_counters import fused_attention
from rlr_peft.chain.base_files import loading_base, place_of_configs
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.families import family_of, models_of
from rlr_peft.chain.memory import largest_block
from rlr_peft.config import Config, ConfigError, ModelArguments, stages_from_config
from rlr_peft.config.model import read_quantization
from rlr_peft.config.reward import VLM_PREFIX
from rlr_peft.config.training import MOST_EVALUATION_IMAGES
from rlr_peft.errors import UserError
from rlr_peft.estimators.base import RunShape, build_estimator
from rlr_peft.estimators.forward import ForwardEstimator
from rlr_peft.plan.blueprint import KnownValues, build_model, build_pipeline, find_architecture, find_component
from rlr_peft.plan.measurements import (
    largest_quantized,
    measure,
    optimizer_bytes,
    weight_bytes,
)
from rlr_peft.plan.parts import TINY_VAE, Facts, MemoryPlan, Options, add_up
from rlr_peft.plan.rewards import RewardMemory, is_black_box, reward_memory, reward_names
from rlr_peft.rewards.model_files import ModelFiles
from rlr_peft.rewards.model_reward import weights_dtype
from rlr_peft.rewards.names import UNIFIED_REWARD

# What is suggested where a base does not fit.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def plan_memory(
    config: Config,
    chain: DenoisingChain,
    evaluation_chain: DenoisingChain,
    quantization: Mapping[str, Any] | None = None,
    num_processes: int = 1,
) -> MemoryPlan:
    """Measures and adds up.

    Args:
        chain: its chain, with the adapter attached, over a pipeline on the meta device.
        evaluation_chain: the chain that draws images to look at, over the same pipeline.
        quantization: arguments of BitsAndBytesConfig of the config's file; None without one.
        num_processes: that share the denoiser, if they do.

    Raises:
        ValueError: gradient checkpointing of a model that cannot, or sharding of one whose blocks are not known.
    """
    batch_size = config.training.train_batch_size
    decode_batch_size = min(config.reward.decode_batch_size or batch_size, batch_size)
    validation = config.validation
    compares = validation.evaluation_prompt_path or config.prompts.validation_split_percentage
    compared = (validation.num_evaluation_images or MOST_EVALUATION_IMAGES) if compares else 0
    validated = validation.num_validation_images * len(validation.validation_prompt or ())
    counts = [min(number, validation.evaluation_batch_size) for number in (compared, validated) if number]
    from_images = chain.family.needs_image or config.prompts.image_column is not None
    largest = max(counts, default=None)
    trained, heldout = reward_names(config.reward.reward_fn), reward_names(config.reward.heldout_reward_fn)
    files = ModelFiles(config.reward.reward_model_path, config.model.cache_dir)
    has_gradient = not any(is_black_box(name, files, config.reward.vlm_endpoint) for name in trained)
    shape = RunShape(chain.num_steps, stages_from_config(config))
    estimator = build_estimator(config.estimator, shape).for_reward(has_gradient)
    is_forward, with_gradient = isinstance(estimator, ForwardEstimator), has_gradient and estimator.uses_reward_gradient
    measured = measure(
        *(chain, batch_size, decode_batch_size, evaluation_chain, largest, from_images, with_gradient), not is_forward
    )
    parameters = list(chain.parameters)
    models: dict[str, Any] = models_of(chain.pipeline)
    if config.model.pretrained_tiny_vae_name_or_path is not None:
        models[TINY_VAE] = chain.reward_decoder
    denoisers = {name: models[name] for name in chain.family.denoisers}
    held = quantization or NF4
    differentiated = dict.fromkeys(heldout, False) | dict.fromkeys(trained, with_gradient)
    dtype, on_cpu = (weights_dtype(config.reward.reward_dtype, torch.device(kind)) for kind in ("cuda", "cpu"))
    pixels = measured.images // PIXEL_BYTES
    rewards = {
        count: {
            name: _reward_memory(config, name, count, dtype, pixels, files, wanted)
            for name, wanted in differentiated.items()
        }
        for count in {1, decode_batch_size}
    }
    known = {count: [memory for memory in found.values() if memory] for count, found in rewards.items()}
    weights = {name: memory.weights if memory else 0 for name, memory in rewards[1].items()}
    # The matrix in full width is made in the compute dtype, which is that of the latents' cast.
    full_width = max((largest_quantized(model, held, parameters) for model in denoisers.values()), default=0)
    sharding = config.training.shard_denoiser
    blocks = {name: sharded_bytes(model, num_processes) for name, model in denoisers.items()} if sharding else {}
    facts = Facts(
        measured=measured,
        weights={name: weight_bytes(model, parameters) for name, model in models.items()},
        encoding_block=largest_block(chain.pipeline),
        denoisers=chain.family.denoisers,
        quantized={name: weight_bytes(model, parameters, held) for name, model in denoisers.items()},
        sharded={
            name: weight_bytes(denoisers[name], parameters) - whole + parts
            for name, (whole, parts, _) in blocks.items()
        },
        denoiser_block=max((block for _, _, block in blocks.values()), default=0),
        dequantized=full_width * next(iter(denoisers.values())).dtype.itemsize,
        lora=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        optimizer={
            in_8bit: optimizer_bytes(parameters, config.optimizer.optimizer, in_8bit) for in_8bit in (False, True)
        },
        rewards=sum(weights.values()),
        rewards_at_once=max(sum(weights[name] for name in trained), *(weights[name] for name in heldout), 0),
        scoring={count: max((memory.scoring for memory in found), default=0) for count, found in known.items()},
        each_reward={name: memory for name, memory in rewards[1].items() if memory},
        rewards_on_cpu=on_cpu.itemsize // dtype.itemsize,
        compared=compared,
        validated=validated,
        prompt=measured.embeddings // (2 * batch_size),  # each is held alone and in its batch
    )
    options = Options(
        gradient_checkpointing=config.model.gradient_checkpointing,
        vae_gradient_checkpointing=config.model.vae_gradient_checkpointing,
        decode_batch_size=decode_batch_size,
        offload=config.model.offload,
        offload_text_encoders=config.model.offload_text_encoders,
        offload_rewards=config.reward.offload_rewards,
        quantized=quantization is not None,
        use_8bit_adam=config.optimizer.use_8bit_adam,
        use_ema=config.optimizer.use_ema,
        keeps_old_weights=is_forward,
        keeps_reference=config.lora.reference == "init_adapter",
        keeps_best_weights=config.regularization.early_stopping_steps is not None,
        goes_back=goes_back(config.optimizer, estimator),
        reward_gradient=with_gradient,
        shard_denoiser=sharding,
        evaluation_batch_size=max(counts, default=1),
    )
    _check(options, facts)
    return add_up(facts, options, tuple(name for name, memory in rewards[1].items() if memory is None))


def _check(options: Options, facts: Facts) -> None:
    for flag, wanted, possible in (
        ("gradient_checkpointing", options.gradient_checkpointing, True in facts.measured.step),
        ("vae_gradient_checkpointing", options.vae_gradient_checkpointing, (1, True) in facts.measured.decode),
    ):
        if wanted and not possible:
            raise ValueError(f"{flag}: the model cannot recompute its activations; leave --{flag} out.")


META = torch.device("meta")
PIXEL_BYTES = 3 * 4  # three channels in float32


class PlanError(UserError, RuntimeError):
    """A pipeline that cannot be followed without values."""


def plan_run(config: Config, num_processes: int = 1) -> MemoryPlan:
    """The memory plan of a config, of each of its processes; nothing but small configs is read.

    Raises:
        ConfigError: the run cannot be built as asked for.
        ArchitectureError: the pipeline's configs cannot be found.
        PlanError: the pipeline looks at values that only weights give, which a plan does not have.
    """
    model = config.model
    dtype = DTYPES[model.mixed_precision]
    if config.training.shard_denoiser and num_processes == 1:
        raise ConfigError(
            "shard_denoiser: expected several processes that share the denoiser, got one; give --num_processes, or "
            "leave --shard_denoiser out."
        )
    with as_config_error():
        architecture = find_architecture(place_of_configs(model), model.revision, model.cache_dir)
        replaced = _replaced(model, dtype)
        with loading_base(model.pretrained_model_name_or_path):
            pipeline = build_pipeline(architecture, META, dtype, replaced)
        family = family_of(pipeline, config.lora.denoisers)
        attach_adapters(config, pipeline, family)
        decoder = _reward_decoder(model, pipeline, dtype)
        try:
            with KnownValues(), fused_attention():
                chain = build_training_chain(config, pipeline, decoder)
                looking = evaluation_chain(config, build_chain(config, pipeline))
            path = model.bnb_quantization_config_path
            with KnownValues():
                quantization = None if path is None else read_quantization(path)
                return plan_memory(config, chain, looking, quantization, num_processes)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise PlanError(
                f"{type(pipeline).__name__} cannot be planned: it looks at values that only weights give, or deep into "
                f"its tokenizer ({reason}). Start it with a small --max_train_steps and read the peak memory in its "
                "metrics instead."
            ) from error


def _reward_memory(
    config: Config, name: str, count: int, dtype: torch.dtype, pixels: int, files: ModelFiles, with_gradient: bool
) -> RewardMemory | None:
    is_elsewhere = name.startswith((VLM_PREFIX, UNIFIED_REWARD)) and config.reward.vlm_endpoint is not None
    return RewardMemory(0, 0) if is_elsewhere else reward_memory(name, count, dtype, pixels, files, with_gradient)


def _replaced(model: ModelArguments, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    parts = {}
    for component, name in (
        ("vae", model.pretrained_vae_model_name_or_path),
        ("motion_adapter", model.pretrained_motion_adapter_name_or_path),
    ):
        if name is not None:
            config = find_component(name, model.cache_dir)
            parts[component] = build_model(config, str(config["_class_name"]), META, dtype)
    return parts


def _reward_decoder(model: ModelArguments, pipeline: Any, dtype: torch.dtype) -> torch.nn.Module | None:
    name = model.pretrained_tiny_vae_name_or_path
    if name is None:
        return own_reward_decoder(model, pipeline)
    decoder = build_model(find_component(name, model.cache_dir), "AutoencoderTiny", META, dtype)
    check_reward_decoder(pipeline, decoder)
    return decoder
