"""A pipeline in the chain's hands: its own call with the chain's scheduler, remembered prompts and reward decoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.chain.input_casts import cast_inputs_to_weights
from rlr_peft.chain.pipeline_call import PipelineCall
from rlr_peft.chain.prompt_memory import PromptMemory
from rlr_peft.chain.recording_scheduler import RecordingScheduler
from rlr_peft.chain.text_encoders import OffloadedTextEncoders


class DrivenPipeline:
    """Calls a pipeline on the slice of steps that its scheduler exposes.

    The pipeline is left as it was after every call: what is exchanged, is exchanged only meanwhile. (Half-precision
    denoisers and decoders keep a hook that casts their inputs.)

    Args:
        pipeline: a loaded pipeline.
        call: its undecorated call, with the options of the chain.
        scheduler: stands in for the pipeline's.
        device: where the models work.
        denoisers: attributes of the pipeline that hold what is trained.
        embeddings_dtype: of the prompts' embeddings; pipelines cast their latents to it.
        offload_text_encoders: keep the text encoders on the CPU but while new prompts are encoded.
        reward_decoder: decodes in place of the pipeline's VAE; None leaves the VAE.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        call: PipelineCall,
        scheduler: RecordingScheduler,
        *,
        device: torch.device,
        denoisers: Sequence[str],
        embeddings_dtype: torch.dtype,
        offload_text_encoders: bool = False,
        reward_decoder: torch.nn.Module | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._call = call
        self._scheduler = scheduler
        self._device = device
        self._reward_decoder = reward_decoder
        self._offloaded = OffloadedTextEncoders(pipeline, device) if offload_text_encoders else None
        encode = pipeline.encode_prompt if self._offloaded is None else self._offloaded.encoding(pipeline.encode_prompt)
        self._encode_prompt = PromptMemory(encode, dtype=embeddings_dtype)
        for module in _denoisers_and_decoder(pipeline, denoisers, reward_decoder):
            cast_inputs_to_weights(module)

    def __call__(
        self, prompts: Sequence[str], latents: torch.Tensor | None, output_type: str = "latent", **options: Any
    ) -> torch.Tensor:
        """What the pipeline's undecorated ``__call__`` returns of the exposed slice.

        Args:
            prompts: B texts.
            latents: where to start, (B, ...); None lets the pipeline draw noise.
            output_type: ``latent`` or ``pt``.
            options: of the call, over those of the chain.
        """
        with self._in_hand() as pipeline:
            return self._call(pipeline, list(prompts), latents, output_type, **options)

    @torch.no_grad()
    def initial_latents(self, prompts: Sequence[str], generator: torch.Generator | None = None) -> torch.Tensor:
        """x_T as the pipeline itself draws it, (B, ...): an empty slice returns where it started.

        Without a generator the numbers are anything, and the global random state is left as it was.
        """
        devices = [self._device] if self._device.type == "cuda" else []
        options: dict[str, Any] = {} if generator is None else {"generator": generator}
        self._scheduler.expose(0, 0, None)
        with torch.random.fork_rng(devices, enabled=generator is None):
            return self(prompts, None, **options)

    def settle(self) -> tuple[int, ...]:
        """Shape of one sample's latents, asked of the pipeline itself, which thereby settles its grid.

        Raises:
            ValueError: the pipeline returns something else than one tensor of latents.
        """
        latents = self.initial_latents([""])
        if not torch.is_tensor(latents) or latents.shape[0] != 1:
            raise ValueError('expected one tensor of latents (1, ...) for one prompt with output_type="latent"')
        return tuple(latents.shape[1:])

    def decode(self, prompts: Sequence[str], latents: torch.Tensor, **options: Any) -> torch.Tensor:
        """Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] of clean latents, on the tape if gradients are."""
        self._scheduler.expose(0, 0, None)
        with self._reward_decoder_as_vae():
            return self(prompts, latents, output_type="pt", **options)

    @contextmanager
    def _in_hand(self) -> Iterator[DiffusionPipeline]:
        pipeline = self._pipeline
        scheduler, progress = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
        pipeline.scheduler, pipeline.encode_prompt = self._scheduler, self._encode_prompt
        pipeline.set_progress_bar_config(**{**progress, "disable": True})
        try:
            with nullcontext() if self._offloaded is None else self._offloaded.hidden():
                yield pipeline
        finally:
            pipeline.scheduler, pipeline._progress_bar_config = scheduler, progress
            del pipeline.encode_prompt

    @contextmanager
    def _reward_decoder_as_vae(self) -> Iterator[None]:
        if self._reward_decoder is None:
            yield
            return
        attributes = self._pipeline.__dict__  # past the pipeline's __setattr__, which would note it in its config
        vae, attributes["vae"] = attributes["vae"], self._reward_decoder
        try:
            yield
        finally:
            attributes["vae"] = vae


def _denoisers_and_decoder(
    pipeline: DiffusionPipeline, denoisers: Sequence[str], reward_decoder: Any
) -> Iterator[torch.nn.Module]:
    """Every module that latents enter: a second expert too that is not trained."""
    vae = getattr(pipeline, "vae", None)
    names = dict.fromkeys((*denoisers, "unet", "transformer", "transformer_2"))
    places = [(pipeline, name) for name in names]
    for owner, name in [*places, (vae, "decoder"), (vae, "post_quant_conv"), (reward_decoder, "decoder")]:
        module = getattr(owner, name, None)
        if isinstance(module, torch.nn.Module):
            yield module
