"""Tokenizer and text encoders of the scenes pipelines: CLIP's own classes, a few hundred tokens, a few layers."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_align.scenes.world.grammar import BACKGROUNDS, COLORS, COUNTS, POSITIONS, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 24


def vocabulary_words() -> list[str]:
    """Every word of the grammar, so that each becomes one token; other text falls back to characters."""
    phrases = [*RELATIONS, *POSITIONS, *COLORS, *SIZES, *COUNTS, *BACKGROUNDS, *SHAPES]
    phrases += [shape + ("es" if shape == "cross" else "s") for shape in SHAPES]
    phrases += ["a", "an", "and", "on", "background", "make", "the", "remove", "add"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train a byte-pair encoding on the grammar's words, write vocab.json and merges.txt, load it as CLIP's."""
    model = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trainer = BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model.train_from_iterator(vocabulary_words(), trainer)
    learned = json.loads(model.to_str())["model"]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in learned["merges"])]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    merges = "\n".join(" ".join(m) for m in learned["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    settings = {"model_max_length": MAX_TOKENS, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _config(tokenizer: CLIPTokenizer, hidden: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=hidden,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        initializer_factor=3.0,
    )


def build_sdxl_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Widths 64 and 128: SDXL concatenates the penultimate states of both, so one layer more than is used."""
    return CLIPTextModel(_config(tokenizer, 64, 3)), CLIPTextModelWithProjection(_config(tokenizer, 128, 4))


def build_sd_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(_config(tokenizer, 128, 3))
