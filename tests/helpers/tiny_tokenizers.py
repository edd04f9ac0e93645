"""Tokenizers of the families in use, small, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "def read_lines(path):\n    return [line for line in open(path)]\n",
    "The weather in Köln is schön, naïve façade; 東京の天気 🙂🙃 don't!",
    "a  b   c  x_y == z != w",
]


SPECIALS = ["<unk>", "<s>", "</s>", "<|sep|>"]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Pico: BPE over bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma: spaces as ▁, unknown characters as runs of <0xXX>."""
    pieces = ["▁", "▁a", "▁the", "b", "é", "don", "'t", "�", "▁▁"]
    words = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """As T5 and XLM-R: SentencePiece unigrams."""
    pieces = [*SPECIALS, "▁", "▁a", "▁the", "b", "é", "▁don", "'t", "▁▁"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([(p, -1.0) for p in pieces], 0))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    """As BERT: ## joins, and spaces before punctuation are cleaned up."""
    words = [*SPECIALS, "a", "##b", "don", "'t", " n't", ".", "the", "##", "é", "!"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def end_of_word() -> tokenizers.Tokenizer:
    """As GPT-1: </w> ends a word."""
    words = [*SPECIALS, "a", "b</w>", "c", "the</w>", "é</w>"]
    tokenizer = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


FAMILIES = {
    make.__name__: make for make in (byte_level, byte_fallback, metaspace, word_pieces, end_of_word)
}


def save(directory: Path, tokenizer: tokenizers.Tokenizer, **files: Any) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory
