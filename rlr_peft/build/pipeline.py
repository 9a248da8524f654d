"""Loads the base pipeline as the config asks for it."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import diffusers
import torch
from diffusers import (
    AutoencoderTiny,
    AutoModel,
    BitsAndBytesConfig,
    DiffusionPipeline,
    MotionAdapter,
    PipelineQuantizationConfig,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn
from transformers import ProcessorMixin, Qwen2VLProcessor
from transformers.utils import is_torchvision_available

from rlr_peft.build.reporting import hide_loading_bars
from rlr_peft.chain.base_files import (
    check_loaded,
    class_settings,
    load_single_file,
    loading_base,
    place_of_configs,
    read_model_index,
)
from rlr_peft.chain.families import DENOISERS, GENERIC, ONE_VIDEO_VAES, TILED_VAES, family_of, family_of_class
from rlr_peft.chain.memory import hidden, in_tiles, offload_models, offload_text_encoders, text_encoders
from rlr_peft.config import Config, ConfigError, ModelArguments
from rlr_peft.config.model import DTYPE_NAMES, is_single_file, read_quantization
from rlr_peft.errors import extra
from rlr_peft.tiny_shapes import PIPELINE_NAME, pipeline_path

logger = logging.getLogger(__name__)

QWEN_PROCESSOR = ["transformers", "Qwen2VLProcessor"]
Precision = Literal["no", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPE_NAMES.items()}
UNET_MULTIPLE = 8  # of pixels: diffusers' pipelines with a UNet refuse another height or width, whatever their VAE
# Options about loading, which an object leaves no choice of.
LOADING_OPTIONS = (
    *("revision", "variant", "pretrained_vae_model_name_or_path", "pretrained_motion_adapter_name_or_path"),
    *("bnb_quantization_config_path", "offload"),
)


def load_pipeline(
    arguments: ModelArguments, device: torch.device, *, shards_denoisers: bool = False
) -> DiffusionPipeline:
    """The frozen base pipeline on its device, in eval mode and without safety checker.

    With ``offload`` its models stay in host memory and come to the device when they are called. Denoisers that are to
    be sharded stay there until then.

    Raises:
        BaseModelError: the folder or the Hub repository does not hold a diffusers pipeline that can be loaded.
        ValueError: the VAE cannot recompute its activations, or the denoiser cannot use the attention backend.
    """
    hide_loading_bars()
    dtype = DTYPES[arguments.mixed_precision]
    name = arguments.pretrained_model_name_or_path
    load = load_single_file if is_single_file(name) else _load_folder
    pipeline = load(arguments, dtype, _replacing_parts(arguments, dtype))
    check_loaded(name, pipeline)
    prepare_pipeline(pipeline, arguments, device, shards_denoisers=shards_denoisers)
    return pipeline


def check_image_sizes(config: Config) -> None:
    """Refuses sizes that the base cannot draw, by its small files alone, before models are loaded.

    An AutoencoderKL halves an image once for every level but the first; pipelines of one with a UNet want multiples of
    `UNET_MULTIPLE`, and a transformer sees its latents in whole patches. What else a pipeline wants shows when it is
    called.

    Raises:
        BaseModelError: the base is not there, or its files cannot be read.
        ConfigError: a height or width, in pixels, that is no multiple.
    """
    chain, model = config.chain, config.model
    sizes = {"resolution": chain.resolution, "height": chain.height, "width": chain.width}
    sizes["evaluation_resolution"] = config.validation.evaluation_resolution
    given = {name: size for name, size in sizes.items() if size is not None}
    if not given or is_single_file(model.pretrained_model_name_or_path):
        return
    source, where = place_of_configs(model), {"revision": model.revision, "cache_dir": model.cache_dir}
    index = read_model_index(source, **where)
    if index.get("vae") != ["diffusers", "AutoencoderKL"]:
        return
    with loading_base(model.pretrained_model_name_or_path):
        vae = AutoModel.load_config(source, subfolder="vae", **where)
        seen = AutoModel.load_config(source, subfolder="transformer", **where) if index.get("transformer") else {}
    latent = 2 ** (len(vae["block_out_channels"]) - 1)
    multiple = math.lcm(latent * patch_side(seen, vae), UNET_MULTIPLE if index.get("unet") else 1)
    for name, size in given.items():
        if size % multiple:
            below = size - size % multiple
            near = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise ConfigError(
                f"{name}: expected a multiple of {multiple} pixels, as {index['_class_name']} needs here, got {size}; "
                f"take {near}."
            )


def patch_side(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """The side, in latents, of what a transformer takes as one: its own patches, of what its pipeline packs before.

    Args:
        transformer, vae: their configs. As many latents are packed into one as the transformer has more channels.
    """
    patch = transformer.get("patch_size", transformer.get("all_patch_size", 1))
    packed = (transformer.get("in_channels") or 0) // vae.get("latent_channels", 4)
    return max(patch if isinstance(patch, list | tuple) else [patch]) * max(1, math.isqrt(packed))


def denoisers_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """All denoisers that the pipeline has, by its names of them, whether or not they are trained."""
    parts = pipeline.components
    return {name: parts[name] for name in DENOISERS if isinstance(parts.get(name), nn.Module)}


def _replacing_parts(arguments: ModelArguments, dtype: torch.dtype) -> dict[str, Any]:
    """Models of other places than the base's, by the pipeline's name of them."""
    asked: dict[str, tuple[Any, str | None]] = {
        "vae": (AutoModel, arguments.pretrained_vae_model_name_or_path),
        "motion_adapter": (MotionAdapter, arguments.pretrained_motion_adapter_name_or_path),
    }
    replaced = {}
    for part, (model_class, name) in asked.items():
        if name is not None:
            with loading_base(name):
                replaced[part] = model_class.from_pretrained(name, dtype=dtype, cache_dir=arguments.cache_dir)
    return replaced


def _load_folder(arguments: ModelArguments, dtype: torch.dtype, replaced: dict[str, Any]) -> DiffusionPipeline:
    """The pipeline of a folder or a repository of the Hub, with some parts in place of its own."""
    source, where = place_of_configs(arguments), {"revision": arguments.revision, "cache_dir": arguments.cache_dir}
    index = read_model_index(source, **where)
    of_videos = "motion_adapter" in replaced
    pipeline_class: Any = diffusers.AnimateDiffPipeline if of_videos else getattr(diffusers, index["_class_name"])
    with loading_base(arguments.pretrained_model_name_or_path, arguments.variant):
        if index.get("processor") == QWEN_PROCESSOR and not is_torchvision_available():
            processor = PictureProcessor.from_pretrained(source, subfolder="processor", **where)
            replaced = {**replaced, "processor": processor}
        pipeline: DiffusionPipeline = pipeline_class.from_pretrained(
            source,
            variant=arguments.variant,
            dtype=dtype,
            **where,
            **class_settings(pipeline_class),
            **pipeline_quantization(arguments, dtype),
            **replaced,
        )
    return pipeline


def prepare_pipeline(
    pipeline: DiffusionPipeline, arguments: ModelArguments, device: torch.device, *, shards_denoisers: bool = False
) -> None:
    """Freezes a loaded base, in eval mode, and switches on what the config asks of it, on its device.

    Denoisers that are to be sharded are left where they are.

    Raises:
        ValueError: the VAE cannot recompute its activations, or the denoiser cannot use the attention backend.
    """
    if not arguments.offload:
        staying = text_encoders(pipeline) if arguments.offload_text_encoders else {}
        with hidden(pipeline, staying | (denoisers_of(pipeline) if shards_denoisers else {})):
            pipeline.to(device)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
            keep_weights_as_quantized(component)
    vae = getattr(pipeline, "vae", None)
    if (
        vae is not None
        and DTYPES[arguments.mixed_precision] == torch.float16
        and hasattr(pipeline, "upcast_vae")
        and vae.config.force_upcast
    ):
        # The pipeline (SDXL) would cast it to and fro around each decode, under the feet of the tape.
        logger.info("The VAE overflows in fp16 and is kept in fp32; --pretrained_vae_model_name_or_path replaces it.")
        vae.to(torch.float32)
    if vae is not None and type(vae).__name__ in ONE_VIDEO_VAES:
        vae.enable_slicing()
    if vae is not None and type(vae).__name__ in TILED_VAES:
        vae.enable_tiling()
    if arguments.vae_gradient_checkpointing:
        enable_checkpointing(vae, "vae_gradient_checkpointing")
    if arguments.attention_backend is not None:
        set_attention_backend(pipeline, arguments.attention_backend)
    if arguments.offload:
        offload_models(pipeline, device)
    elif arguments.offload_text_encoders:
        offload_text_encoders(pipeline, device)
    pipeline.set_progress_bar_config(disable=True)


def described_by(pipeline: object, arguments: ModelArguments, denoisers: Sequence[str] | None = None) -> ModelArguments:
    """The options of a base that is given as an object: its name, as far as it has one, and its number format.

    Its safety checker, which is no part of the chain, is taken off.

    Args:
        arguments: the config's options of the base.
        denoisers: the names of what is trained; None leaves it to the family.

    Raises:
        ValueError: no denoiser under these names.
        ConfigError: no pipeline, one that has an adapter already or a number format that is not trained in, or an
            option about loading, which an object leaves no choice of.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise ConfigError(f"pipeline: expected a loaded diffusers pipeline, got {type(pipeline).__name__}.")
    for name in LOADING_OPTIONS:
        if getattr(arguments, name):
            raise ConfigError(f"{name}: expected a base by its name, got a pipeline that is loaded; leave it out.")
    for name, part in pipeline.components.items():
        if getattr(part, "peft_config", None):
            raise ConfigError(
                f"pipeline: expected a base without adapters, got one in its {name}; fuse or unload it first."
            )
    formats: dict[torch.dtype, Precision] = {DTYPES[name]: name for name in get_args(Precision)}
    dtype = getattr(pipeline, family_of(pipeline, denoisers).denoisers[0]).dtype
    if dtype not in formats:
        raise ConfigError(f"pipeline: expected weights in fp32, fp16 or bf16, got {dtype}.")
    if getattr(pipeline, "safety_checker", None) is not None:
        logger.info("The pipeline's safety checker is taken off: training sees all images.")
        pipeline.safety_checker = None
    name = str(pipeline.name_or_path or "") or f"a {type(pipeline).__name__} in memory"
    return replace(
        arguments,
        pretrained_model_name_or_path=PIPELINE_NAME if name == str(pipeline_path()) else name,
        mixed_precision=formats[dtype],
    )


def load_reward_decoder(
    arguments: ModelArguments, pipeline: DiffusionPipeline, device: torch.device
) -> torch.nn.Module | None:
    """The small VAE that decodes for the training reward, frozen, or the pipeline's in tiles; None for the pipeline's.

    Raises:
        OSError: the folder or the Hub repository does not hold an AutoencoderTiny.
        ValueError: it decodes other latents than the pipeline's, or the pipeline's VAE knows no tiles.
    """
    name = arguments.pretrained_tiny_vae_name_or_path
    if name is None:
        return own_reward_decoder(arguments, pipeline)
    decoder = AutoencoderTiny.from_pretrained(
        name, dtype=DTYPES[arguments.mixed_precision], cache_dir=arguments.cache_dir
    )
    check_reward_decoder(pipeline, decoder)
    if arguments.vae_gradient_checkpointing:
        enable_checkpointing(decoder, "vae_gradient_checkpointing")
    return decoder.to(device).requires_grad_(False).eval()


def own_reward_decoder(arguments: ModelArguments, pipeline: Any) -> torch.nn.Module | None:
    """The pipeline's VAE in tiles, if they are asked for.

    Raises:
        ValueError: it knows none.
    """
    size = arguments.vae_tile_size
    return None if size is None else in_tiles(getattr(pipeline, "vae", None), size)


def check_reward_decoder(pipeline: Any, decoder: Any) -> None:
    """Raises a ValueError where the decoder does not decode the pipeline's latents."""
    vae = getattr(pipeline, "vae", None)
    channels = getattr(getattr(vae, "config", None), "latent_channels", None)
    if type(vae).__name__ != "AutoencoderKL" or channels != decoder.config.latent_channels:
        raise ValueError(
            f"pretrained_tiny_vae_name_or_path: expected a pipeline with an AutoencoderKL of "
            f"{decoder.config.latent_channels} latent channels, as the tiny VAE has, got {type(vae).__name__} with "
            f"{channels}; use the tiny VAE of the base's family (taesd, taesdxl, taesd3, taef1) or leave "
            "--pretrained_tiny_vae_name_or_path out."
        )


def enable_checkpointing(model: Any, flag: str) -> None:
    """Recomputes the model's activations in the backward pass.

    Raises:
        ValueError: the model's class cannot.
    """
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"{flag}: diffusers' {type(model).__name__} cannot recompute its activations; leave --{flag} out and lower "
            "the batch, the resolution or, of a video, --decoded_frames."
        )
    model.enable_gradient_checkpointing()


def pipeline_quantization(arguments: ModelArguments, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` of a pipeline is told so that its denoisers are held in 4 or 8 bits."""
    if arguments.bnb_quantization_config_path is None:
        return {}
    extra("bitsandbytes", "quantization", "--bnb_quantization_config_path")
    settings = read_quantization(arguments.bnb_quantization_config_path)
    if settings.get("load_in_4bit"):
        settings = {"bnb_4bit_compute_dtype": dtype} | settings
    config = BitsAndBytesConfig(**settings)
    names = dict.fromkeys(DENOISERS, config)
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=names)}


def keep_weights_as_quantized(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in the first forward without gradients on a CPU.

    On processors with AVX512-BF16 it does so by default. A repacked layer has no gradient, and layers with rows shorter
    than a block of 64 weights fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def set_attention_backend(pipeline: DiffusionPipeline, backend: str) -> None:
    """Chooses the attention kernel of every denoiser that the pipeline has.

    Raises:
        ValueError: an unknown name, a kernel that is not installed, or a denoiser that leaves no choice.
    """
    known = sorted(name.value for name in AttentionBackendName)
    if backend not in known:
        raise ValueError(f"attention_backend: expected one of {', '.join(known)}, got {backend}.")
    family = family_of_class(type(pipeline).__name__) or GENERIC
    for name in family.denoisers:
        denoiser = getattr(pipeline, name, None)
        if denoiser is None:
            continue
        processors = (getattr(module, "processor", None) for module in denoiser.modules())
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise ValueError(
                f"attention_backend: diffusers offers no choice for {type(denoiser).__name__}, which uses torch's own "
                "fused attention; leave --attention_backend out."
            )
        try:
            denoiser.set_attention_backend(backend)
        except RuntimeError as error:
            raise ValueError(f"attention_backend: {backend} cannot be used here: {error}") from error


def compile_denoisers(denoisers: Iterable[nn.Module]) -> None:
    """Compiles the repeated blocks where the class names them, which starts far faster, else the whole denoiser."""
    for denoiser in denoisers:
        if getattr(denoiser, "_repeated_blocks", None):
            denoiser.compile_repeated_blocks()  # type: ignore[operator]
        else:
            denoiser.compile()


class PictureProcessor(Qwen2VLProcessor):
    """transformers' ``Qwen2VLProcessor`` without its part for videos, where there is no torchvision.

    A saved pipeline names transformers' own class.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


PictureProcessor.__name__, PictureProcessor.__module__ = Qwen2VLProcessor.__name__, Qwen2VLProcessor.__module__
