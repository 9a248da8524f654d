"""Builds a run as training does, but without weights, and plans its memory."""

from dataclasses import replace
from typing import Any

import torch

from rlr_peft.build.chain import attach_adapters, build_chain, denoiser_names
from rlr_peft.build.pipeline import DTYPES, check_reward_decoder
from rlr_peft.build.reporting import as_config_error
from rlr_peft.chain.base_files import loading_base
from rlr_peft.chain.families import family_of
from rlr_peft.config import Config, ModelArguments
from rlr_peft.config.model import read_quantization
from rlr_peft.errors import UserError
from rlr_peft.evaluation.memory_plan.architecture import find_architecture, find_component
from rlr_peft.evaluation.memory_plan.blueprint import build_model, build_pipeline
from rlr_peft.evaluation.memory_plan.known_values import KnownValues
from rlr_peft.evaluation.memory_plan.live_memory import fused_attention
from rlr_peft.evaluation.memory_plan.plan import MemoryPlan
from rlr_peft.evaluation.memory_plan.planning import plan_memory
from rlr_peft.tiny_shapes import PIPELINE_NAME, pipeline_path

META = torch.device("meta")


class PlanError(UserError, RuntimeError):
    """A pipeline that cannot be followed without values."""


def plan_run(config: Config) -> MemoryPlan:
    """The memory plan of a config; nothing but small configs is read.

    Raises:
        ConfigError: the run cannot be built as asked for.
        ArchitectureError: the pipeline's configs cannot be found.
        PlanError: the pipeline looks at values that only weights give, which a plan does not have.
    """
    model = config.model
    dtype = DTYPES[model.mixed_precision]
    with as_config_error():
        architecture, replaced = _architecture(model), _replaced(model, dtype)
        with loading_base(model.pretrained_model_name_or_path):
            pipeline = build_pipeline(architecture, META, dtype, replaced)
        family = family_of(pipeline, denoiser_names(config))
        attach_adapters(config, pipeline, family)
        decoder = _reward_decoder(model, pipeline, dtype)
        try:
            with KnownValues(), fused_attention():
                built = _without_moves(config)
                chain = build_chain(built, pipeline, config.chain.eta, config.reward.decoded_frames, decoder)
                looking = build_chain(built, pipeline, config.validation.evaluation_eta)
            path = model.bnb_quantization_config_path
            with KnownValues():
                return plan_memory(config, chain, looking, None if path is None else read_quantization(path))
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise PlanError(
                f"{type(pipeline).__name__} cannot be planned: it looks at values that only weights give, or deep into "
                f"its tokenizer ({reason}). Start it with a small --max_train_steps and read the peak memory in its "
                "metrics instead."
            ) from error


def _without_moves(config: Config) -> Config:
    """Without the chain's own moves of text encoders: nothing leaves meta, and the sums know what is where."""
    if not config.model.offload_text_encoders:
        return config
    stays: dict[str, Any] = {"offload_text_encoders": False}
    return replace(config, model=replace(config.model, **stays))


def _architecture(model: ModelArguments) -> Any:
    name = model.pretrained_model_name_or_path
    path = str(pipeline_path()) if name == PIPELINE_NAME else name
    return find_architecture(path, model.revision, model.cache_dir)


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
        return None
    decoder = build_model(find_component(name, model.cache_dir), "AutoencoderTiny", META, dtype)
    check_reward_decoder(pipeline, decoder)
    return decoder
