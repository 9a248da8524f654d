"""Video pipelines of the real classes with tiny random weights."""

from typing import Any

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from tests.families.image_pipelines import DYNAMIC_SHIFT
from tests.families.text_encoders import gemma3_encoder, gemma_tokenizer, t5_encoder, t5_tokenizer, umt5_encoder
from tests.pipelines import WIDTH, clip_text_model, image_vae, letter_tokenizer


def text_to_video_sd() -> TextToVideoSDPipeline:
    """ModelScope: a UNet3D, whose step sees frames in the batch."""
    return TextToVideoSDPipeline(
        vae=image_vae(4),
        text_encoder=clip_text_model(),
        tokenizer=letter_tokenizer(),
        unet=UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
    )


def animatediff_unet() -> UNet2DConditionModel:
    """The UNet of AnimateDiff's base."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def animatediff() -> AnimateDiffPipeline:
    """A Stable Diffusion UNet with motion modules."""
    return AnimateDiffPipeline(
        vae=image_vae(4),
        text_encoder=clip_text_model(),
        tokenizer=letter_tokenizer(),
        unet=animatediff_unet(),
        motion_adapter=MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=4,
            motion_num_attention_heads=2,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
        ),
    )


def _wan_transformer(in_channels: int = 4, image_dim: int | None = None) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=WIDTH,
        image_dim=image_dim,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )


def wan() -> WanPipeline:
    """Wan 2.1: one transformer, a causal video VAE, UniPC on a shifted flow."""
    return _wan()


def wan_two_experts() -> WanPipeline:
    """Wan 2.2: one expert for high noise, one for low."""
    return _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)


def wan_image_to_video() -> WanImageToVideoPipeline:
    """Wan 2.1: the first frame as channels of the latents, with a mask, and through an encoder of images."""
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    size = {"height": 16, "width": 16}
    return _wan(
        WanImageToVideoPipeline,
        transformer=_wan_transformer(in_channels=12, image_dim=WIDTH),
        image_encoder=encoder,
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
    )


def wan_first_frame() -> WanImageToVideoPipeline:
    """Wan 2.2 TI2V: the first latent frame is the picture's, and has a timestep of its own."""
    return _wan(WanImageToVideoPipeline, expand_timesteps=True)


def _wan(kind: Any = WanPipeline, **parts: Any) -> Any:
    parts = {"transformer": _wan_transformer(), **parts}
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[1.0, 1.2, 0.8, 1.1],
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **parts,
    )


def cogvideox() -> CogVideoXPipeline:
    """CogVideoX: v prediction up to pure noise, trailing steps, frames before channels."""
    return CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=WIDTH,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=5,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=3.0,
        ),
    )


def ltx() -> LTXPipeline:
    """LTX-Video: packed latents of a video."""
    return _ltx(LTXPipeline)


def ltx_image_to_video() -> LTXImageToVideoPipeline:
    """LTX-Video: the first latent frame is the picture's, and steps leave it out."""
    pipeline = _ltx(LTXImageToVideoPipeline)
    variance = pipeline.vae.encoder.conv_out.conv  # a trained encoder is nearly sure of the latents
    variance.weight.data[-1].zero_()
    variance.bias.data[-1] = -30.0
    return pipeline


def _ltx(kind: Any) -> Any:
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC_SHIFT, shift_terminal=0.1),
        vae=AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=WIDTH,
        ),
    )


def ltx_2() -> LTX2Pipeline:
    """LTX-2: sound beside the video, in the same transformer and the same steps; guidance by three further passes."""
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=WIDTH,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC_SHIFT, shift_terminal=0.1),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=gemma3_encoder(),
        tokenizer=gemma_tokenizer(),
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )
