"""Tokenizers and text encoders of every family, made in memory and as small as their classes allow."""

from transformers import (
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from rlr_peft.build import PictureProcessor
from tests.pipelines import WIDTH

SMALL = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2}

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def t5_tokenizer() -> T5Tokenizer:
    """One piece a letter, and the word boundary."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=32)


def t5_encoder() -> T5EncoderModel:
    """SD3's, FLUX's, PixArt's, CogVideoX's and LTX's encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=WIDTH,
            d_kv=8,
            d_ff=WIDTH,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def umt5_encoder() -> UMT5EncoderModel:
    """Wan's encoder."""
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(t5_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    )


def gemma_tokenizer() -> GemmaTokenizer:
    """Sana's tokenizer."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=32)


def gemma_encoder() -> Gemma2Model:
    """Sana's encoder."""
    return Gemma2Model(
        Gemma2Config(vocab_size=len(gemma_tokenizer()), **SMALL, num_hidden_layers=1, num_key_value_heads=2, head_dim=8)
    )


def gemma3_encoder() -> Gemma3ForConditionalGeneration:
    """LTX-2's encoder, of which every hidden state is used."""
    text = {"vocab_size": len(gemma_tokenizer()), **SMALL, "num_hidden_layers": 1, "num_key_value_heads": 2}
    vision = {"image_size": 16, "patch_size": 8, **SMALL, "num_hidden_layers": 1}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text | {"head_dim": 8}, vision_config=vision))


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level letters with Qwen's chat marks."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokens = [*letters, *special]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def qwen_vl_processor() -> PictureProcessor:
    """Qwen-Image-Edit's: few tokens a picture."""
    return PictureProcessor(Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56), qwen_tokenizer())


def qwen_vl_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """Qwen-Image's encoder."""
    text = {
        "vocab_size": len(qwen_tokenizer()),
        **SMALL,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
    }
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    tokens = {
        f"{name}_token_id": qwen_tokenizer().convert_tokens_to_ids(f"<|{mark}|>")
        for name, mark in (
            *(("image", "image_pad"), ("video", "video_pad")),
            *(("vision_start", "vision_start"), ("vision_end", "vision_end")),
        )
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))


def qwen3_config(num_hidden_layers: int = 2) -> Qwen3Config:
    """Of Z-Image's and FLUX.2 Klein's encoder."""
    return Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        **SMALL,
        num_hidden_layers=num_hidden_layers,
        num_key_value_heads=2,
        head_dim=8,
    )


def qwen3_encoder() -> Qwen3Model:
    """Z-Image's encoder, which uses the last but one hidden state."""
    return Qwen3Model(qwen3_config())
