"""A run whose pairs are labelled by a scorer at its start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from diffusion_align.adapters import load_adapter
from diffusion_align.data import load_pairs
from diffusion_align.rewards import load_scorer
from diffusion_align.training.pairs.config import DPOConfig, SFTConfig
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.run import train
from diffusion_align.training.settings import validated


@pytest.mark.slow
def test_a_run_learns_from_the_scorer_s_labels_and_makes_them_once(
    pairs_folder: Path, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: dict[str, Any] = {
        "model": str(sdxl_folder), "dataset": str(pairs_folder), "per_device_train_batch_size": 2, "max_steps": 1,
        "report_to": "none", "progress": False, "output_dir": str(tmp_path), "relabel_with": "scenes-oracle",
        "relabel_temperature": 0.5,
    }  # fmt: skip
    train(DPOConfig(**run))
    assert "12 pairs: " in capsys.readouterr().err
    made = (tmp_path / "relabelled" / "train-00000.parquet").stat().st_mtime_ns
    adapter, oracle, before = load_adapter(sdxl_folder), load_scorer("scenes-oracle"), load_pairs(pairs_folder)
    source: Any = build_pair_source(DPOConfig(**run), adapter)
    assert (tmp_path / "relabelled" / "train-00000.parquet").stat().st_mtime_ns == made
    pairs, changed = source.examples.dataset, 0
    for i in range(len(pairs)):
        better, worse = oracle.score(list(pairs[i].images()), [pairs[i].caption] * 2).reward.tolist()
        assert better > worse
        assert pairs[i].preference == pytest.approx(1 / (1 + math.exp(-(better - worse) / 0.5)))
        changed += pairs[i].chosen != before[i].chosen  # type: ignore[index]
    assert 0 < changed < len(pairs)
    alone: Any = build_pair_source(SFTConfig(**run), adapter)
    assert alone.examples.dataset[0].chosen == pairs[0].chosen


def test_a_temperature_needs_a_scorer() -> None:
    with pytest.raises(ValueError, match="relabel_temperature softens the labels of relabel_with"):
        validated(DPOConfig, {"relabel_temperature": 1.0}, "recipe")


@pytest.mark.parametrize("values", [{"cache_dir": "c"}, {"streaming": True}])
def test_labels_for_several_runs_are_made_by_the_command(values: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=f"relabel_with cannot be used with {next(iter(values))}: label the pairs with"
    ):
        validated(DPOConfig, {"relabel_with": "pickscore", **values}, "recipe")
