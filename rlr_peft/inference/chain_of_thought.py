"""The Diffusive Chain-of-Thought around any supported pipeline: a prompt per stage of the denoising chain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput

from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.config import ChainArguments, ChainOfThoughtArguments
from rlr_peft.config.chain_of_thought import stages_from_arguments
from rlr_peft.config.yaml_files import read_yaml
from rlr_peft.prompts.chain_of_thought import Decomposer, as_prompt
from rlr_peft.prompts.rule_based import SCALES, decompose_by_rules
from rlr_peft.stages import Stages, make_stages

Given = str | Sequence[str] | dict[str, str]


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
        options: of ``DenoisingChain``: num_inference_steps, step_kind, eta, guidance_scale, negative_prompt and more.

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
        **options: Any,
    ) -> None:
        self.stages: Stages = make_stages(stages, fractions)
        if decompose is None and self.stages.names == SCALES:
            decompose = decompose_by_rules
        self._decompose = self._refuse if decompose is None else decompose
        self.chain = DenoisingChain(pipeline, stages=self.stages, **options)

    @classmethod
    def from_config(
        cls, pipeline: DiffusionPipeline, path: str | Path, decompose: Decomposer | None = None, **options: Any
    ) -> Self:
        """With the stages and the chain of a training run.

        Args:
            pipeline: loaded without safety checker, with the run's adapter.
            path: the run's ``config.yaml``.
            decompose: splits a prompt that comes without stage prompts.
            options: over those of the run, for example ``eta=0.0`` for images without the noise of training.

        Raises:
            ConfigError: a file that cannot be read.
            ValueError: a run without stages.
        """
        values = read_yaml(Path(path))
        stages = stages_from_arguments(ChainOfThoughtArguments(**_group(ChainOfThoughtArguments, values)))
        if stages is None:
            raise ValueError(
                f"Expected the config of a run with stage prompts, got {path} without any; draw with the pipeline "
                "itself, or name the chain's options: DiffusiveChainOfThought(pipe, num_inference_steps=...)."
            )
        denoiser = values.get("denoiser")
        trained = {
            **vars(ChainArguments(**_group(ChainArguments, values))),
            "denoisers": None if denoiser is None else [name.strip() for name in denoiser.split(",")],
        }
        return cls(
            pipeline, stages=stages.names, fractions=stages.fractions, decompose=decompose, **{**trained, **options}
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Given | Sequence[Mapping[str, str]],
        *,
        seeds: Sequence[int] | None = None,
        output_type: str = "pil",
    ) -> ChainOfThoughtOutput:
        """Draws images or videos.

        Args:
            prompt: a text, which is split into stages; the texts of the stages as a mapping by name (``{"coarse": ...,
                "mid": ..., "fine": ...}``) or as a ``Prompt`` that carries them; or a list of these, in which a tuple
                is the texts of one sample's stages.
            seeds: one per sample; by default 0, 1, ...
            output_type: ``pil`` or ``pt``.

        Raises:
            PromptError: a prompt that cannot be split, or stage prompts that do not fit the stages.
            ValueError: another number of seeds than prompts, or an unknown output type.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f"Expected output_type pil or pt, got {output_type}.")
        given: list[Any] = [prompt] if isinstance(prompt, (str, dict)) else list(prompt)
        prompts = [as_prompt(one, self.stages.names, self._decompose) for one in given]
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"Expected one seed for each of {len(prompts)} prompts, got {len(seeds)}.")
        trajectory = self.chain.sample(prompts, seeds)
        drawn = self.chain.decode(trajectory.latents[0], prompts).float()
        is_video = drawn.ndim == 5
        result = drawn if output_type == "pt" else [_pil(video) for video in drawn] if is_video else _pil(drawn)
        stage_prompts = [prompt.stages for prompt in prompts]
        if is_video:
            return ChainOfThoughtOutput(frames=result, stage_prompts=stage_prompts)
        return ChainOfThoughtOutput(images=result, stage_prompts=stage_prompts)

    def _refuse(self, prompt: str) -> Sequence[str]:
        raise ValueError(
            f"Expected the stage prompts of {prompt!r} ({', '.join(self.stages.names)}): the built-in rules know "
            "coarse, mid and fine only. Give a mapping of names to texts, or pass `decompose`."
        )


def _group(arguments: type[ChainArguments | ChainOfThoughtArguments], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one group; those that the file leaves out keep their defaults."""
    return {field.name: values[field.name] for field in fields(arguments) if field.name in values}


def _pil(images: torch.Tensor) -> list[Any]:
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images.clamp(0, 1)))
