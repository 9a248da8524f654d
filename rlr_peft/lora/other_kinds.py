"""Files that people take for LoRA adapters and that are something else, told by the names of their tensors."""

import re
from collections.abc import Collection

_LORA = re.compile(r"[._]lora(?:[._]|\d)|\.hada_|\.lokr_")

# What the names of adapters of other kinds hold, whatever else is in the file.
_OTHER_ADAPTERS = (
    (r"lora_controlnet", "a Control-LoRA, a ControlNet in small", "load it with diffusers' ControlNetModel"),
    (r"\.ia3_|\.on_input$", "an IA3 adapter", "peft alone can apply it; train or take a LoRA"),
    (r"\.b?oft_|\.oft_blocks|\.oft_diag", "an OFT adapter", "peft alone can apply it; train or take a LoRA"),
    (r"\.vera_lambda", "a VeRA adapter", "peft alone can apply it; train or take a LoRA"),
    (r"\.fourierft_", "a FourierFT adapter", "peft alone can apply it; train or take a LoRA"),
    (r"\.lora_embedding_", "a LoRA of an embedding table", "diffusers cannot load it; take one without"),
    (r"\.diff(?:_b|_m)?$|\.[wb]_norm$", "an adapter with whole differences of weights (`diff`, `w_norm`)", "these "
     "are no LoRA; ask its author for one, or merge it with the program that made it"),
    (r"^image_proj\.|^ip_adapter\.|^image_proj_model\.", "an IP-Adapter", "load it with pipe.load_ip_adapter"),
    (r"string_to_param|^emb_params$|^clip_[lg]$|^t5xxl$|^<[^.]+>$", "a textual inversion, new words for the text "
     "encoder", "load it with pipe.load_textual_inversion"),
)  # fmt: skip

# Whole models; asked only where no name is of a LoRA. The first that fits is taken.
_MODELS = (
    (r"^control_model\.|controlnet_cond_embedding|^zero_convs|input_hint_block|controlnet_down_blocks|controlnet_blocks",
     "a ControlNet", "load it with diffusers' ControlNetModel"),
    (r"^model\.diffusion_model\.|^first_stage_model\.|^cond_stage_model\.|^conditioner\.", "a whole checkpoint in one "
     "file, a base and no adapter", "give it as the base, or take an adapter"),
    (r"motion_modules\.|temporal_transformer", "a motion module", "give it as pretrained_motion_adapter_name_or_path"),
    (r"^adapter\.body\.|^body\.\d+\.", "a T2I-Adapter", "load it with diffusers' T2IAdapter"),
    (r"^encoder\.(?:conv_in|down)|^decoder\.(?:conv_in|up|mid)|^(?:post_)?quant_conv\.|^vae\.", "a VAE", "give it as "
     "pretrained_vae_model_name_or_path"),
    (r"^(?:unet\.|transformer\.|diffusion_model\.)?(?:down_blocks|up_blocks|mid_block|conv_in|time_embedding|input_blocks|"
     r"output_blocks|middle_block|transformer_blocks|single_transformer_blocks|double_blocks|single_blocks|joint_blocks|"
     r"blocks|layers|x_embedder|patch_embed\w*)\.", "the weights of a whole denoiser", "give its pipeline as the base, "
     "and an adapter as the adapter"),
    (r"^(?:text_encoder\.)?(?:text_model|encoder\.block|encoder\.layers|shared|embeddings|model\.layers)\b", "the "
     "weights of a text encoder", "take an adapter"),
    (r"^(?:state|param_groups|optimizer\w*|lr_scheduler\w*|epoch|global_step|step)$", "a training state", "take the "
     "adapter that was saved beside it"),
)  # fmt: skip


def other_kind(names: Collection[str]) -> str | None:
    """What a file with these tensor names is and what to do with it, if it is no adapter that can be loaded.

    Returns:
        Half a sentence for "expected LoRA weights, got ...", or None for a LoRA, LoHa or LoKr.
    """
    has_lora = any(_LORA.search(name) for name in names)
    for pattern, kind, advice in (*_OTHER_ADAPTERS, *(() if has_lora else _MODELS)):
        found = next((name for name in names if re.search(pattern, name)), None)
        if found is not None:
            return f"{kind} (it holds {found[:100]}): {advice}"
    if not names:
        return "a file without tensors; get it again"
    if not has_lora:
        first = ", ".join(sorted(names)[:2])[:200]
        return f"a file without a tensor that is named as LoRA weights are ({first}, ...); take another file"
    return None
