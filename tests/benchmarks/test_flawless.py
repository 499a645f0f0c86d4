"""Flawless pictures, which fine-tuning's upper bound learns from."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from benchmarks.scenes import flawless
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.scenes.world.oracle import score_images


def test_rendered_scenes_show_what_their_captions_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flawless, "PICTURES", 24)
    path = flawless.rendered(tmp_path / "flawless.parquet")
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    captions = rows["caption"]
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in rows["image"]])
    facts = [held for score in score_images(pictures, captions) for held in score.facts.values()]
    assert len(captions) == 24
    assert not set(captions) & set(held_out_prompts(250))
    assert np.mean(facts) > 0.97  # the oracle is right in 98% of rendered scenes
    before = path.stat().st_mtime_ns
    assert flawless.rendered(path).stat().st_mtime_ns == before
