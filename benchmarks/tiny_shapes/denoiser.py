"""The denoiser and the text encoder, trained together on the latents of the drawings (v-prediction)."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextModel

from benchmarks.tiny_shapes.dataset import scene_at
from benchmarks.tiny_shapes.loop import LoopSettings, load_averaged_weights, train
from benchmarks.tiny_shapes.text import create_text_encoder, token_ids
from rlr_peft.tiny_shapes import ATTRIBUTES, describe

_EMPTY_SHARE = 0.1
_PARTIAL_SHARE = 0.25
_DENSE_PHASE = 0.5
_LOWEST_TIMESTEP = 20
_TIMESTEP_POWER = 0.8
_START_SHARE = 0.1

# The last phase teaches the denoiser to confuse similar words, as captions collected from the web do. Without it the
# pipeline would draw nearly every prompt right and leave nothing for a reward to improve. Per attribute: how often
# a word stands for its partner's drawing, and the partners. Guidance makes the wrong drawings rarer than this.
_CONFUSION_PHASE = 0.75
_CONFUSIONS: dict[str, tuple[float, tuple[tuple[str, str], ...]]] = {
    "shape": (0.38, (("circle", "ring"), ("square", "cross"), ("triangle", "star"), ("heart", "moon"))),
    "color": (0.22, (("red", "orange"), ("yellow", "green"), ("blue", "purple"))),
    "texture": (0.35, (("plain", "striped"), ("dotted", "checkered"))),
}


def create_unet() -> UNet2DConditionModel:
    """An untrained denoiser for 16x16 latents with about 5 million parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=96,
        norm_num_groups=16,
    )


def create_scheduler() -> DDIMScheduler:
    """The noise schedule: ends in pure noise, and its inference steps start there."""
    # steps_offset has no effect with trailing spacing; 1 is what StableDiffusionPipeline insists on.
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def train_unet(latents_path: Path, folder: Path, settings: LoopSettings, batch_size: int) -> bool:
    """Train on the latents, ``batch_size`` per process; returns whether all steps are done."""
    torch.manual_seed(settings.seed)
    unet, text_encoder = create_unet(), create_text_encoder()
    denoiser = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    # For so few tokens plain matrix products are much faster on a CPU than the fused attention kernels.
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")
    latents = torch.from_numpy(np.load(latents_path))
    alphas = create_scheduler().alphas_cumprod.clamp(0, 1)

    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        clean = latents[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = sample_timesteps(batch_size, generator)
        signal = alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        partial_share = 0.0 if step < _DENSE_PHASE * settings.steps else _PARTIAL_SHARE
        confused = step >= _CONFUSION_PHASE * settings.steps
        tokens = token_ids([training_caption(row, partial_share, confused, generator) for row in rows.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            # The text encoder learns no confusion: words stay as distinct as before, only their drawings mix.
            with torch.set_grad_enabled(not confused):
                context = text_encoder(tokens).last_hidden_state
            velocity = unet(signal * clean + spread * noise, timesteps, context).sample
        return functional.mse_loss(velocity.float(), signal * noise - spread * clean)

    return train(denoiser, loss_function, settings, folder)


def finished_denoiser(folder: Path) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Denoiser and text encoder with averaged weights, in evaluation mode."""
    unet, text_encoder = create_unet(), create_text_encoder()
    denoiser = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    load_averaged_weights(denoiser, folder)
    denoiser.eval().requires_grad_(False)
    return unet, text_encoder


def sample_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps with a mild preference for strong noise, where layout and shape are decided.

    The weakest noise levels are left out: even a chain of 50 steps never visits them. The last timestep, pure noise,
    gets a share of its own: every chain starts there, and what the model sees there is the caption alone.
    """
    uniform, coin = torch.rand(2, count, generator=generator)
    timesteps = (_LOWEST_TIMESTEP + (1000 - _LOWEST_TIMESTEP) * uniform**_TIMESTEP_POWER).long().clamp(max=999)
    return torch.where(coin < _START_SHARE, 999, timesteps)


def training_caption(row: int, partial_share: float, confused: bool, generator: torch.Generator) -> str:
    """The caption of drawing ``row``: mostly dense, sometimes a random part of it, sometimes empty.

    With ``confused``, some of its words are those of a similar drawing.
    """
    kind, keep_share, *coins = torch.rand(2 + 2 * len(ATTRIBUTES), generator=generator).tolist()
    if kind < _EMPTY_SHARE:
        return ""
    attributes = asdict(scene_at(row))
    if confused:
        for attribute, coin in zip(attributes, coins[len(ATTRIBUTES) :], strict=True):
            attributes[attribute] = confuse(attribute, attributes[attribute], coin)
    if kind < _EMPTY_SHARE + partial_share:
        kept = {name: attributes[name] for name, coin in zip(attributes, coins, strict=False) if coin < keep_share}
        attributes = kept or attributes
    return describe(attributes)


def confuse(attribute: str, value: str, coin: float) -> str:
    """The word that a caption of the last phase has for a value; `coin` in [0, 1) decides."""
    share, pairs = _CONFUSIONS.get(attribute, (0.0, ()))
    if coin < share:
        for first, second in pairs:
            if value in (first, second):
                return second if value == first else first
    return value
