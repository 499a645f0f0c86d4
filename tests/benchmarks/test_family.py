"""Rows of the family's table: equally many pictures a step, and thumbs that are the pairs' pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scenes import family
from benchmarks.scenes.thumbs import make_thumbs
from diffusion_align.data import PairDataset, load_examples, load_pairs


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    make_thumbs(folder / "thumbs")
    return folder


@pytest.mark.parametrize("name", family.ROWS)
def test_a_step_has_equally_many_pictures(name: str, work: Path) -> None:
    row = family.ROWS[name]
    config = row.config(60, work)
    config.check()
    pictures = {"pairs": 2, "lists": family.PICTURES, "thumbs": 1}[row.data]
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * pictures == 48
    assert config.max_steps == 60
    if row.data != "lists":  # whose files are not made here
        assert config.work().trained == pictures


def test_equal_calls_are_the_calls_of_dpo(work: Path) -> None:
    runs = family.planned(["dpo", "inpo", "kto", "mapo"], ["pairs", "calls"], 60, work)
    assert list(runs) == ["dpo", "inpo", "inpo, equal calls", "kto", "mapo", "mapo, equal calls"]
    paid = family.denoiser_calls(runs["dpo"])
    for name in ("inpo, equal calls", "mapo, equal calls"):
        assert family.denoiser_calls(runs[name]) == pytest.approx(paid, rel=0.02)
    assert family.denoiser_calls(runs["kto"]) == paid


def test_thumbs_are_the_pictures_of_the_pairs(work: Path) -> None:
    pairs, thumbs = load_pairs("scenes-pairs", "train"), load_examples(str(work / "thumbs"), "train")
    assert isinstance(pairs, PairDataset)
    assert isinstance(thumbs, PairDataset)
    assert len(thumbs) == 2 * len(pairs)
    for index in (0, 7, len(pairs) - 1):
        liked, disliked = thumbs[2 * index], thumbs[2 * index + 1]
        assert (liked.judgement.label, disliked.judgement.label) == (1, -1)
        assert liked.caption == disliked.caption == pairs[index].caption
        assert (*liked.images(), *disliked.images()) == pairs[index].images()


def test_settings_of_a_row_do_not_depend_on_where_its_data_lie(work: Path) -> None:
    config = family.ROWS["kto"].config(60, work)
    elsewhere = replace(config, dataset="elsewhere/thumbs", output_dir="x", seed=9)
    assert family.settings_of(config) == family.settings_of(elsewhere)
    assert family.settings_of(config)["dataset"] == "thumbs"
    assert family.settings_of(replace(config, beta=1.0)) != family.settings_of(config)
