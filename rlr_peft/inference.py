"""The Diffusive Chain-of-Thought around any supported pipeline: a prompt per stage of the denoising chain."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput

from rlr_peft.build.chain import StageForm, choose_stage_form
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.config import ChainArguments, ChainOfThoughtArguments, LoraArguments
from rlr_peft.config.chain import StageFormName
from rlr_peft.config.parsing import read_config
from rlr_peft.prompt import Prompt, PromptError, PromptLike, Stages, make_stages
from rlr_peft.prompts.chain_of_thought import (
    SCALES,
    STAGE_PROMPTS_FILE,
    Decomposer,
    decompose_by_rules,
    read_stages,
    staged_prompt,
)

logger = logging.getLogger(__name__)

_CHAIN_NAMES = [field.name for field in fields(ChainArguments)]
_NAMES = [*_CHAIN_NAMES, *(field.name for field in fields(ChainOfThoughtArguments)), "denoiser"]

Given = PromptLike | Sequence[str] | Mapping[str, str]


@dataclass
class ChainOfThoughtOutput(BaseOutput):
    """What was drawn.

    Attributes:
        images: PIL images, or a tensor (B, 3, H, W) in [0, 1]; None from a pipeline that makes videos.
        frames: the PIL images of every video, or a tensor (B, F, 3, H, W); None from a pipeline that makes images.
        stage_prompts: the prompts of every sample's stages, noise first.
    """

    images: Any = None
    frames: Any = None
    stage_prompts: Any = None


class DiffusiveChainOfThought:
    """Draws with a prompt per stage, exactly as training with the same options did.

    Steps, guidance and decoding are those of the training chain, so that the same seeds give the same images bit for
    bit in the same batch. An adapter must be in the pipeline already (``pipe.load_lora_weights``).

    Args:
        pipeline: loaded without safety checker.
        stages: names of the stages, noise first; None for coarse, mid, fine.
        fractions: share of the steps of every stage; None for equal parts.
        decompose: splits a prompt that comes without stage prompts; None for the built-in rules, which know coarse, mid
            and fine only.
        form: how stage prompts condition a stage, as ``--dcot_form``; or that of a run.
        options: of the chain: num_inference_steps, step_kind, eta, guidance_scale, negative_prompt and more; and those
            of ``DenoisingChain`` itself.

    Raises:
        ValueError: stages that do not fit the number of steps, or a pipeline that cannot be driven.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        stages: Sequence[str] | None = None,
        fractions: Sequence[float] | None = None,
        decompose: Decomposer | None = None,
        form: StageFormName | StageForm = "auto",
        **options: Any,
    ) -> None:
        self.stages: Stages = make_stages(stages, fractions)
        if decompose is None and self.stages.names == SCALES:
            decompose = decompose_by_rules
        self._decompose = self._refuse if decompose is None else decompose
        knobs = ChainArguments(**{name: options.pop(name) for name in _CHAIN_NAMES if name in options})
        if not isinstance(form, StageForm):
            form = choose_stage_form(form, pipeline, knobs, options.get("denoisers"))
        self.chain = DenoisingChain(pipeline, knobs, stages=self.stages, stage_form=form, **options)

    @classmethod
    def from_config(
        cls, pipeline: DiffusionPipeline, path: str | Path, decompose: Decomposer | None = None, **options: Any
    ) -> Self:
        """With the stages and the chain of a training run.

        You name the file, but it may have come with somebody's adapter, so it is asked for plain values only: stages,
        steps, guidance, negative prompt, the names of the denoisers, and where the stage prompts are kept. Whatever it
        says, nothing is imported, connected to or written: of models and endpoints (``dcot_model``,
        ``dcot_endpoint``) only the answers that stand in the file of stage prompts are read.

        Args:
            pipeline: loaded without safety checker, with the run's adapter.
            path: the run's ``config.yaml``.
            decompose: splits a prompt that comes without stage prompts; None does as the run did: by the rules or from
                its file of stage prompts (``dcot_cache``, or the one beside the config). Where these came from columns,
                the whole prompt conditions all stages, as in the run's validation.
            options: over those of the run, for example ``eta=0.0`` for images without the noise of training.

        Raises:
            ConfigError: a file that cannot be read, an unknown name or a wrong type.
            PromptError: a file of stage prompts of another form.
            ValueError: a run without stages.
        """
        values = read_config(Path(path), _NAMES)
        arguments = ChainOfThoughtArguments(**_group(ChainOfThoughtArguments, values))
        stages = arguments.stages()
        if stages is None:
            raise ValueError(
                f"Expected the config of a run with stage prompts, got {path} without any; draw with the pipeline "
                "itself, or name the chain's options: DiffusiveChainOfThought(pipe, num_inference_steps=...)."
            )
        if decompose is None:
            decompose = _as_the_run(arguments, stages, Path(path).parent)
        trained = ChainArguments(**_group(ChainArguments, values))
        denoisers = LoraArguments(**_group(LoraArguments, values)).denoisers
        return cls(
            pipeline,
            stages=stages.names,
            fractions=stages.fractions,
            decompose=decompose,
            form=choose_stage_form(arguments.dcot_form, pipeline, trained, denoisers, by_rules=arguments.dcot_rules),
            **{**vars(trained), "denoisers": denoisers, **options},
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Given | Sequence[Given],
        *,
        seeds: Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        **others: Any,
    ) -> ChainOfThoughtOutput:
        """Draws images or videos.

        Args:
            prompt: a text, which is split into stages; the texts of the stages as a mapping by name (``{"coarse": ...,
                "mid": ..., "fine": ...}``), as a tuple, or as a ``Prompt`` that carries them; or a list of these.
            seeds: one per sample; by default 0, 1, ...
            num_images_per_prompt: samples of every prompt, side by side.
            output_type: ``pil`` or ``pt``.
            others: refused; what concerns the chain is settled when this object is made.

        Raises:
            PromptError: a prompt that cannot be split, or stage prompts that do not fit the stages.
            ValueError: no prompt, another number of seeds than samples, or an unknown output type.
            TypeError: an argument that only the pipeline itself takes.
        """
        if others:
            raise TypeError(
                f"Expected no {', '.join(others)} here: give seeds=[...] in place of a generator, and guidance_scale, "
                "negative_prompt, num_inference_steps and sizes to DiffusiveChainOfThought(pipe, ...) itself."
            )
        if output_type not in ("pil", "pt"):
            raise ValueError(f"Expected output_type pil or pt, got {output_type}.")
        given: list[Any] = [prompt] if isinstance(prompt, (str, Prompt, tuple, Mapping)) else list(prompt)
        if not given or num_images_per_prompt < 1:
            raise ValueError(
                f"Expected one prompt or more and num_images_per_prompt of 1 or more, got {len(given)} and "
                f"{num_images_per_prompt}."
            )
        each = [staged_prompt(one, self.stages.names, self._decompose) for one in given]
        prompts = [one for one in each for _ in range(num_images_per_prompt)]
        seeds = list(range(len(prompts))) if seeds is None else [seeds] if isinstance(seeds, int) else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"Expected one seed for each of {len(prompts)} samples, got {len(seeds)}.")
        trajectory = self.chain.sample(prompts, seeds)
        drawn = self.chain.decode(trajectory.latents[0], prompts).float()
        is_video = drawn.ndim == 5
        result = drawn if output_type == "pt" else [_pil(video) for video in drawn] if is_video else _pil(drawn)
        stage_prompts = [prompt.stages for prompt in prompts]
        if is_video:
            return ChainOfThoughtOutput(frames=result, stage_prompts=stage_prompts)
        return ChainOfThoughtOutput(images=result, stage_prompts=stage_prompts)

    def _refuse(self, prompt: str) -> Sequence[str]:
        raise PromptError(
            f"expected the stage prompts of {prompt!r} ({', '.join(self.stages.names)}): the built-in rules know "
            "coarse, mid and fine only. Give a mapping of names to texts, or pass `decompose`."
        )


def _as_the_run(arguments: ChainOfThoughtArguments, stages: Stages, folder: Path) -> Decomposer:
    """Splits a text as a run with these arguments and this output folder did; writes no file."""
    if arguments.dcot_columns is not None:
        return lambda prompt: (prompt,) * stages.count
    file = folder / STAGE_PROMPTS_FILE if arguments.dcot_cache is None else Path(arguments.dcot_cache)
    if arguments.dcot_rules and arguments.dcot_cache is None:
        return decompose_by_rules
    known = read_stages(file, stages.names) if file.is_file() else {}  # no device, which would have no end
    if arguments.dcot_rules and not known:
        logger.warning("%s is not here: prompts are split by the rules alone.", file)

    def decompose(prompt: str) -> Sequence[str]:
        if prompt in known:
            return known[prompt]
        if arguments.dcot_rules:
            return decompose_by_rules(prompt)
        raise PromptError(
            f"expected the stage prompts of {prompt!r} in {file}, where the run kept those of "
            f"{arguments.dcot_model or arguments.dcot_endpoint_model}; give a mapping of {', '.join(stages.names)} to "
            "texts, or pass `decompose`"
        )

    return decompose


def _group(
    arguments: type[ChainArguments | ChainOfThoughtArguments | LoraArguments], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of one group; those that the file leaves out keep their defaults."""
    return {field.name: values[field.name] for field in fields(arguments) if field.name in values}


def _pil(images: torch.Tensor) -> list[Any]:
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images.clamp(0, 1)))
