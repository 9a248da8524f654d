"""The arguments of a pipeline's own ``__call__``: which it takes is read off its signature."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.chain.families import Family
from rlr_peft.prompt import negative_prompt_of

DEFAULT_FPS = 8


class PipelineCall:
    """Calls a pipeline, undecorated, with the options of a chain.

    Args:
        pipeline: a loaded pipeline.
        family: its row.
        num_inference_steps: T.
        guidance_scale: the family's own guidance: classifier-free, or the number that a guidance-distilled model is
            told; None takes the pipeline's default.
        true_cfg_scale: classifier-free guidance of pipelines whose ``guidance_scale`` is distilled into the model.
        negative_prompt: what guidance steers away from.
        resolution: height and width in pixels, where these do not say otherwise.
        height: in pixels; None takes the resolution, else the pipeline's default.
        width: in pixels; None takes the resolution, else the pipeline's default.
        num_frames: of a video; None takes the pipeline's default.
        fps: frames per second, for models that are told; None takes the pipeline's default.
        max_sequence_length: of the tokenised prompt; None takes the pipeline's default.

    Attributes:
        guidance_scale: the scale in use; 1 if the pipeline has none.
        is_video: whether the pipeline makes videos.
        fps: frames per second of its videos.
        guidance: the guidance arguments as the pipeline spells them, for the card.
        card_options: what makes the pipeline draw the same without the chain, for the card.

    Raises:
        ValueError: an option that the pipeline does not take, or a pipeline that cannot be given prompts and latents.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: Family,
        *,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: str | None = None,
        resolution: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: int | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        self._name = type(pipeline).__name__
        self._undecorated: Callable[..., Any] = inspect.unwrap(type(pipeline).__call__)  # without its no_grad
        self.parameters = inspect.signature(self._undecorated).parameters
        for needed in ("prompt", "latents", "num_inference_steps", "output_type"):
            if needed not in self.parameters:
                raise ValueError(f"{self._name} cannot be driven as a chain: its call takes no `{needed}`.")
        self._num_inference_steps = num_inference_steps
        self.is_video = "num_frames" in self.parameters
        self.guidance = self._guidance(family, guidance_scale, true_cfg_scale)
        self.guidance_scale = float(self.guidance.get(family.guidance_argument, 1.0))
        self._options = self._checked(
            {
                "height": height or resolution,
                "width": width or resolution,
                "num_frames": num_frames,
                "max_sequence_length": max_sequence_length,
            }
        )
        frame_rate = self.parameters.get("frame_rate")
        if fps is not None and frame_rate is not None:
            self._options["frame_rate"] = fps
        self.fps: int = fps or (DEFAULT_FPS if frame_rate is None else frame_rate.default)
        if "use_resolution_binning" in self.parameters:  # it would resize the images after decoding
            self._options["use_resolution_binning"] = False
        self._negative_prompt = self._checked({"negative_prompt": negative_prompt}).get("negative_prompt")
        if self._negative_prompt is None and self.guidance.get("true_cfg_scale", 1.0) > 1:
            self._negative_prompt = " "  # without one these pipelines switch their guidance off
        negative = {} if self._negative_prompt is None else {"negative_prompt": self._negative_prompt}
        self.card_options: dict[str, Any] = {**self.guidance, **self._options, **negative}

    def __call__(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        latents: torch.Tensor | None,
        output_type: str,
        **options: Any,
    ) -> torch.Tensor:
        """What the pipeline returns first: latents, images (B, 3, H, W) or videos (B, F, 3, H, W).

        Args:
            pipeline: driven by the recording scheduler.
            prompts: B texts.
            latents: where to start; None lets the pipeline draw noise.
            output_type: ``latent`` or ``pt``.
            options: further arguments, over those of the chain.
        """
        arguments = self._options | self.guidance | options
        negative_prompts = self.negative_prompts(prompts)
        if negative_prompts is not None:
            arguments["negative_prompt"] = negative_prompts
        return self._undecorated(
            pipeline,
            prompt=[str(prompt) for prompt in prompts],
            num_inference_steps=self._num_inference_steps,
            latents=latents,
            output_type=output_type,
            return_dict=False,
            **arguments,
        )[0]

    def negative_prompts(self, prompts: Sequence[str]) -> list[str] | None:
        """What guidance steers away from, one text per prompt: the prompt's own, else the chain's; None for nothing.

        Raises:
            ValueError: prompts with negative ones of their own, and a pipeline that takes none.
        """
        own = [negative_prompt_of(prompt) for prompt in prompts]
        if all(text is None for text in own):
            return None if self._negative_prompt is None else [self._negative_prompt] * len(prompts)
        if "negative_prompt" not in self.parameters:
            raise ValueError(f"{self._name} takes no negative_prompt: leave --negative_prompt_column out.")
        default = self._negative_prompt or ""
        return [default if text is None else text for text in own]

    def _guidance(self, family: Family, guidance_scale: float | None, true_cfg_scale: float | None) -> dict[str, float]:
        name = family.guidance_argument
        given = {"true_cfg_scale": true_cfg_scale}
        if guidance_scale is not None:
            if name == "true_cfg_scale" and true_cfg_scale is not None:
                raise ValueError(f"{self._name} has one guidance: give guidance_scale or true_cfg_scale, not both.")
            given[name] = guidance_scale
        guidance = self._checked(given)
        if name in self.parameters and name not in guidance:
            default = self.parameters[name].default
            if isinstance(default, (int, float)):
                guidance[name] = float(default)
        return guidance

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that were given; those that the pipeline does not take are refused."""
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in self.parameters:
                flag = "--resolution" if name in ("height", "width") else f"--{name}"
                raise ValueError(f"{self._name} takes no {name}: leave {flag} out.")
        return given
