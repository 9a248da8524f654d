"""Image pipelines of the real classes with tiny random weights."""

from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen3ForCausalLM

from tests.families.text_encoders import (
    gemma_encoder,
    gemma_tokenizer,
    qwen3_config,
    qwen3_encoder,
    qwen_tokenizer,
    qwen_vl_encoder,
    qwen_vl_processor,
    t5_encoder,
    t5_tokenizer,
)
from tests.pipelines import WIDTH, clip_text_model, image_vae, letter_tokenizer

DYNAMIC_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}


def flow_vae(latent_channels: int) -> AutoencoderKL:
    """The VAE of SD3, FLUX and Z-Image: a shift, and no quantisation convolutions."""
    return image_vae(
        latent_channels, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False
    )


def sdxl() -> StableDiffusionXLPipeline:
    """SDXL with the Euler scheduler of its checkpoints."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=image_vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_text_model(),
        text_encoder_2=clip_text_model(projection=True),
        tokenizer=letter_tokenizer(),
        tokenizer_2=letter_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    """SD3.5, whose scheduler's own last step is nearly dead."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(4),
        text_encoder=clip_text_model(projection=True),
        tokenizer=letter_tokenizer(),
        text_encoder_2=clip_text_model(projection=True),
        tokenizer_2=letter_tokenizer(),
        text_encoder_3=_wide_t5(),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> FluxPipeline:
    """FLUX.1-dev: packed latents, a guidance vector, a shift that depends on the resolution."""
    return _flux(FluxPipeline)


def flux_kontext() -> FluxKontextPipeline:
    """FLUX.1 Kontext: what is drawn from stands beside what is drawn in one sequence."""
    return _flux(FluxKontextPipeline)


def _flux(kind: Any) -> Any:
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC_SHIFT),
        vae=flow_vae(4),
        text_encoder=clip_text_model(),
        tokenizer=letter_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
    )


def flux2_klein() -> Flux2KleinPipeline:
    """FLUX.2 Klein: takes unpacked latents and returns unpacked ones, but steps on packed ones."""
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC_SHIFT),
        vae=AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=Qwen3ForCausalLM(qwen3_config(num_hidden_layers=28)),  # the call reads the layers 9, 18 and 27
        tokenizer=qwen_tokenizer(),
        transformer=Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * WIDTH,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )


def qwen_image() -> QwenImagePipeline:
    """Qwen-Image: prompts of different lengths, two denoiser calls under guidance, a video VAE."""
    return _qwen_image(QwenImagePipeline)


def qwen_image_edit() -> QwenImageEditPipeline:
    """Qwen-Image-Edit: its text encoder sees the picture too."""
    return _qwen_image(QwenImageEditPipeline, processor=qwen_vl_processor())


def qwen_image_edit_plus() -> QwenImageEditPlusPipeline:
    """Qwen-Image-Edit-2509 and later: a call draws one sample."""
    return _qwen_image(QwenImageEditPlusPipeline, processor=qwen_vl_processor())


def _qwen_image(kind: Any, **parts: Any) -> Any:
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC_SHIFT, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[1.0, 1.2, 0.8, 1.1],
        ),
        text_encoder=qwen_vl_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 4, 4),
        ),
        **parts,
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    """PixArt-Sigma: a transformer on the DDPM path that also predicts variances, without a LoRA loader."""
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=image_vae(4, scaling_factor=0.13025),
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
    )


def sana() -> SanaPipeline:
    """Sana: flow matching under DPM-Solver, an autoencoder of another class, linear attention."""
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma_encoder(),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=16,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            decoder_conv_act_fn="silu",
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=WIDTH,
            sample_size=32,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        ),
    )


def z_image() -> ZImagePipeline:
    """Z-Image: lists of embeddings and latents, reversed time, guidance counted from one."""
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(4),
        text_encoder=qwen3_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
    )


def _wide_t5() -> Any:
    """SD3 concatenates two CLIP encodings and pads them to the width of T5."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    return T5EncoderModel(config)
