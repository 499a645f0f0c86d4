"""Flawless pictures, which fine-tuning's upper bound learns from, and benchmarks of the flow model's methods."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from benchmarks.scenes import flawless, online_methods
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.scenes.world.oracle import score_images
from diffusion_align.training.settings import load_recipe


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


@pytest.mark.parametrize("model", online_methods.BASES)
@pytest.mark.parametrize("method", online_methods.METHODS)
def test_each_base_has_a_recipe_of_each_method_and_its_cost_is_known(model: str, method: str) -> None:
    config = load_recipe(f"{online_methods.BASES[model].recipes}_{method}")
    assert config.model == model
    assert isinstance(config, online_methods.Measured)
    assert online_methods.denoiser_calls(config) > 0


def test_inpainting_is_not_measured_beside_a_flow_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        online_methods.main(["--model", "scenes-flow", "--trust", "none"])
    assert "--trust measures an inpainting model beside scenes-sdxl" in capsys.readouterr().err
