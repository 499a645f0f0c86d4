"""SD3 in folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from diffusion_align.adapters import load_adapter
from diffusion_align.adapters.loading import LENGTH_FIELD
from diffusion_align.commands.export import save_merged

from .tiny_flow import LENGTH, sd3_pipeline


def test_sd3_without_t5_loads_and_its_zeros_are_as_many_as_asked(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    pipeline = sd3_pipeline(tokenizer, with_t5=False)
    pipeline.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, max_sequence_length=LENGTH)
    found = adapter.encode_prompts(["a red star"])
    want, _, pooled, _ = pipeline.encode_prompt(
        "a red star", None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
    )
    assert torch.equal(found.embeds, want)
    assert found.pooled is not None
    assert torch.equal(found.pooled, pooled)


@pytest.mark.parametrize("length", [0, LENGTH])
def test_a_folder_says_how_many_tokens_t5_is_given(length: int, tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    pipeline = sd3_pipeline(tokenizer, with_t5=False)
    pipeline.register_to_config(**{LENGTH_FIELD: length})
    pipeline.save_pretrained(tmp_path / "first")
    adapter = load_adapter(tmp_path / "first")
    assert adapter.max_sequence_length == length
    assert load_adapter(tmp_path / "first", max_sequence_length=3).max_sequence_length == 3
    save_merged(adapter, tmp_path / "merged", "fp32")
    assert load_adapter(tmp_path / "merged").max_sequence_length == length
