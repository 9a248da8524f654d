"""Random weights in the real files of vision-language models: tokenizer, chat template, image processor and network."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessorPil,
    GotOcr2Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    TrOCRConfig,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)
from transformers.utils import logging as transformers_logging

Kind = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm"]

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SMOL_TOKENS = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
SMOL_TOKENS += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
WORDS = ["Yes", "yes", "No", "no"]
IMAGE_SEQ_LEN = 4  # of SmolVLM: tokens of a tile of 16 x 16 pixels, in patches of 4, two by two together


def write_vlm(folder: Path, kind: Kind, patch: int | None = None) -> Any:
    """Files as a repository of this kind holds them, but small; returns the network."""
    tokenizer = _tokenizer(SMOL_TOKENS if kind == "smolvlm" else QWEN_TOKENS)
    tokenizer.chat_template = SMOL_TEMPLATE if kind == "smolvlm" else QWEN_TEMPLATE
    processor: Any
    if kind == "smolvlm":
        processor = SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        processor.image_mean = processor.image_std = [0.5, 0.5, 0.5]
        model = _smol(tokenizer)
    else:
        patch = patch or (8 if kind == "qwen3_vl" else 4)
        processor = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=16 * 16, max_pixels=48 * 48)
        model = _qwen(kind, tokenizer, patch)
    transformers_logging.disable_progress_bar()
    _spread(model)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def _spread(model: nn.Module) -> None:
    """Weights far from zero, where a wrong picture would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)


def _tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level, as those of Qwen and SmolLM are, with a few whole words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    merges = []
    for word in (space + word for word in WORDS for space in ("", "Ġ")):
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if "".join(pair) not in vocabulary:
                vocabulary["".join(pair)] = len(vocabulary)
                merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    whole.add_special_tokens({"additional_special_tokens": special})
    return whole


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    config: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    return config | {"tie_word_embeddings": False, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}


def _qwen(kind: Kind, tokenizer: PreTrainedTokenizerFast, patch: int) -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    vision: dict[str, Any] = {"patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2}
    tokens = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in zip(
            ("image", "video", "vision_start", "vision_end"), ("image_pad", "video_pad", "vision_start", "vision_end")
        )
    }
    text = _text(tokenizer) | {"rope_parameters": rope, "head_dim": 16}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))
    vision |= {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 4 * patch, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text["rope_parameters"] = rope | {"mrope_interleaved": True}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))


def _smol(tokenizer: PreTrainedTokenizerFast) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SmolVLMConfig(
        text_config=_text(tokenizer) | {"model_type": "llama"},
        vision_config=vision | {"image_size": 16, "patch_size": 4},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return SmolVLMForConditionalGeneration(config)


def write_trocr(folder: Path) -> tuple[Any, Any]:
    """TrOCR's files, small; returns the network and its processor."""
    tokenizer = _tokenizer(["<s>", "</s>"])
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = ViTConfig(**small, image_size=32, patch_size=8)
    decoder = TrOCRConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        cross_attention_hidden_size=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=start,
        eos_token_id=end,
        decoder_start_token_id=start,
    )
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    model.generation_config = GenerationConfig.from_model_config(decoder)
    processor = TrOCRProcessor(ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    return _written(folder, model, processor)


def write_got_ocr(folder: Path) -> tuple[Any, Any]:
    """GOT-OCR 2's files, small but for the 256 tokens of an image; returns the network and its processor."""
    tokenizer = _tokenizer(["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"])
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32, "output_channels": 16}
    config = GotOcr2Config(
        text_config=_text(tokenizer) | {"model_type": "qwen2"},
        vision_config=vision | {"image_size": 256, "patch_size": 4, "global_attn_indexes": []},
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 256, "width": 256})
    return _written(folder, GotOcr2ForConditionalGeneration(config), GotOcr2Processor(images, tokenizer))


def _written(folder: Path, model: Any, processor: Any) -> tuple[Any, Any]:
    transformers_logging.disable_progress_bar()
    _spread(model)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def write_hpsv3(base: Path, checkpoint: Path, code: Path) -> tuple[Any, nn.Module]:
    """HPSv3's three files: its base, the checkpoint under its own names, and the code that holds its question.

    Returns:
        The Qwen2-VL with its words and one more, and the head.
    """
    model = write_vlm(base, "qwen2_vl", patch=14)
    # Its tokenizer has one token more than the base's.
    model.resize_token_embeddings(model.config.text_config.vocab_size + 1, mean_resizing=False)
    width = model.config.text_config.hidden_size
    head = nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU())
    head.append(nn.Linear(16, 2)).eval()
    _spread(head)
    names = {"model.visual.": "visual.", "model.language_model.": "model."}
    weights = {}
    for name, value in model.state_dict().items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        weights[names.get(prefix, "") + name.removeprefix(prefix)] = value.contiguous()
    weights |= {f"rm_head.{name}": value for name, value in head.state_dict().items()}
    save_file(weights, checkpoint)
    code.write_text(
        'import nowhere\n\nINSTRUCTION = """\nHow good is it?  \nIts text: {text_prompt}\n"""\n\n'
        'prompt_with_special_token = """\nThe score: <|Reward|>\n\nEND\n"""\nprompt_without_special_token = "none"\n'
    )
    return model, head


def write_videoreward(base: Path, published: Path, code: Path) -> Any:
    """VideoReward's three places: its base, config and checkpoint under their names, and the code with its question.

    Returns:
        The Qwen2-VL in `peft`'s wrapper, with LoRA that is not merged, and its head as `rm_head`.
    """
    model = write_vlm(base, "qwen2_vl", patch=14)
    model.resize_token_embeddings(model.config.text_config.vocab_size + 3, mean_resizing=False)
    model.rm_head = nn.Linear(model.config.text_config.hidden_size, 1, bias=False)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name not in ("lm_head", "rm_head")]
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    _spread(wrapped)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.mul_(0.3)
    names = {"model.visual.": "visual.", "model.language_model.": "model."}
    weights = {}
    for name, value in wrapped.state_dict().items():
        own = name.removeprefix("base_model.model.")
        prefix = next((prefix for prefix in names if own.startswith(prefix)), "")
        weights[f"base_model.model.{names.get(prefix, '')}{own.removeprefix(prefix)}"] = value.clone()
    (published / "checkpoint-11352").mkdir(parents=True)
    torch.save(weights, published / "checkpoint-11352" / "model.pth")
    norms = {"VQ_mean": 3.5, "VQ_std": 2.0, "MQ_mean": 1.0, "MQ_std": 1.5, "TA_mean": 3.0, "TA_std": 2.5}
    settings = {
        "data_config": {"fps": 2.0, "max_frame_pixels": 200_704, "sample_type": "uniform"},
        "peft_lora_config": {"lora_r": 4, "lora_alpha": 8, "use_rslora": False},
        "inference_config": norms,
    }
    (published / "model_config.json").write_text(json.dumps(settings))
    code.write_text(
        'import nowhere\n\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = """\nHow clear? <|VQ_reward|>\nHow smooth? '
        '<|MQ_reward|>\nTextual prompt - {text_prompt}\nHow true? <|TA_reward|>\nEND\n"""\n'
    )
    return wrapped
