"""Loading a base with replaced parts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AnimateDiffPipeline, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline

from rlr_peft.build import load_pipeline
from rlr_peft.config import ModelArguments
from tests.families.table import load
from tests.families.video_pipelines import animatediff_unet
from tests.pipelines import chain_over

CPU = torch.device("cpu")


def test_a_motion_adapter_makes_animatediff_of_stable_diffusion(
    folder_of: Callable[[str], str], tmp_path: Path
) -> None:
    whole = load(folder_of("animatediff"))
    whole.motion_adapter.save_pretrained(tmp_path / "motion")
    unet_2d = whole.unet  # the base's weights are those of the motion model without its motion modules
    unet = animatediff_unet()
    unet.load_state_dict({name: value for name, value in unet_2d.state_dict().items() if name in unet.state_dict()})
    StableDiffusionPipeline(
        vae=whole.vae,
        text_encoder=whole.text_encoder,
        tokenizer=whole.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(whole.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "base")
    pipeline = load_pipeline(
        ModelArguments(str(tmp_path / "base"), pretrained_motion_adapter_name_or_path=str(tmp_path / "motion")), CPU
    )
    assert isinstance(pipeline, AnimateDiffPipeline)
    options = {"num_inference_steps": 2, "num_frames": 3, "resolution": 16}
    latents = chain_over(pipeline, **options).sample(["sky"], [0]).latents
    assert torch.equal(latents, chain_over(whole, **options).sample(["sky"], [0]).latents)


def test_another_autoencoder_replaces_the_pipelines(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tiny.save_pretrained(tmp_path)
    pipeline = load_pipeline(ModelArguments(folder_of("sdxl"), pretrained_vae_model_name_or_path=str(tmp_path)), CPU)
    assert isinstance(pipeline.vae, AutoencoderTiny)
    chain = chain_over(pipeline, num_inference_steps=2, resolution=16)
    latents = chain.sample(["sky"], [0]).latents[0].requires_grad_()
    (gradient,) = torch.autograd.grad(chain.decode(latents, ["sky"]).sum(), latents)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("name", "dtype"), [("sdxl", torch.float32), ("sd-epsilon", torch.float16)])
def test_only_sdxls_vae_is_kept_from_overflowing(
    name: str, dtype: torch.dtype, folder_of: Callable[[str], str]
) -> None:
    pipeline = load_pipeline(ModelArguments(folder_of(name), mixed_precision="fp16"), CPU)
    assert pipeline.vae.dtype == dtype and pipeline.unet.dtype == torch.float16
    chain = chain_over(pipeline, num_inference_steps=2, resolution=16)
    latents = chain.sample(["sky"], [0]).latents[0].requires_grad_()
    (gradient,) = torch.autograd.grad(chain.decode(latents, ["sky"]).float().sum(), latents)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
