"""Tokenizer and text encoder of the pipeline: CLIP's classes with a vocabulary of the few words of the captions."""

import functools
import itertools
import json
from collections import Counter
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rlr_peft.tiny_shapes import caption_words

MAX_TOKENS = 32
"""Tokens per prompt, start and end tokens included; the longest dense caption has 19."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


@functools.cache
def tokenizer_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE in which every caption word is one token.

    All 256 bytes are in the vocabulary too, so any other text can be tokenised as well.
    """
    # Merge the most frequent pair, as byte-pair encoding is trained, until no word consists of several pieces.
    words = [[*word[:-1], word[-1] + _WORD_END] for word in caption_words()]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        words = [_merge(word, left, right) for word in words]
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + _WORD_END for symbol in symbols), *(left + right for left, right in merges)]
    vocabulary = {token: number for number, token in enumerate([*dict.fromkeys(tokens), _START, _END])}
    return vocabulary, merges


def create_tokenizer() -> CLIPTokenizer:
    """The tokenizer, padded and cut to ``MAX_TOKENS``."""
    vocabulary, merges = tokenizer_files()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, unk_token=_END, pad_token=_END, model_max_length=MAX_TOKENS)


def write_legacy_tokenizer_files(folder: Path) -> None:
    """Add ``vocab.json`` and ``merges.txt``, without which transformers 4 cannot load the tokenizer."""
    vocabulary, merges = tokenizer_files()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def create_text_encoder() -> CLIPTextModel:
    """An untrained text encoder with about 0.4 million parameters."""
    vocabulary, _ = tokenizer_files()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=96,
            bos_token_id=vocabulary[_START],
            eos_token_id=vocabulary[_END],
            pad_token_id=vocabulary[_END],
        )
    )


def token_ids(captions: list[str]) -> torch.Tensor:
    """Token numbers of captions made of known words, (captions, 32); equal to the tokenizer's and much faster."""
    vocabulary, _ = tokenizer_files()
    table = torch.full((len(captions), MAX_TOKENS), vocabulary[_END])
    for row, caption in enumerate(captions):
        numbers = [vocabulary[_START], *(vocabulary[word + _WORD_END] for word in caption.split())]
        table[row, : len(numbers)] = torch.tensor(numbers)
    return table


def _merge(word: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and merged[-1] == left and piece == right:
            merged[-1] = left + right
        else:
            merged.append(piece)
    return merged


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE uses for each byte: itself, or one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
