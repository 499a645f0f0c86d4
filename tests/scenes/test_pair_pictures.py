"""Preference pairs of the embedded world: who draws the pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pyarrow.parquet import read_table

from diffusion_align.data import load_pairs
from diffusion_align.scenes.make.pairs import deal_sources, draw_split, main, split_file


def test_sources_are_dealt_evenly_and_by_seed() -> None:
    names = ["a", "b", "c"]
    dealt = deal_sources(names, 400, seed=1)
    assert sorted(Counter(dealt).values()) == [133, 133, 134]
    assert dealt == deal_sources(names, 400, seed=1)
    assert dealt != deal_sources(names, 400, seed=2)
    pairs = Counter(frozenset(dealt[i : i + 2]) for i in range(0, 400, 2))
    assert len(pairs) == 6  # three of one source, three of two
    assert deal_sources(["a"], 3, seed=1) == ["a"] * 3


def test_prompts_are_those_of_the_shipped_pairs() -> None:
    assert draw_split("train", 1000, 11, set()) == list(load_pairs("scenes-pairs", keep_ties=True).captions())


def test_pictures_of_others_say_who_drew_them_and_are_the_same_again(tmp_path: Path) -> None:
    asked = ["--pictures", "scenes-sd", "rendered", "--train", "4", "--held-out", "0", "--steps", "1"]
    for name in ("once", "again"):
        main([str(tmp_path / name), *asked])
    files = [split_file(tmp_path / name, "train") for name in ("once", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in (tmp_path / "once").iterdir()] == [files[0].name]
    rows = read_table(files[0]).to_pylist()
    makers = [row[f"model_{i}"].partition(",")[0] for row in rows for i in (0, 1)]
    assert Counter(makers) == {"scenes-sd": 4, "rendered scenes": 4}
    assert all(row["are_different"] for row in rows)
    assert len(load_pairs(str(tmp_path / "once"), keep_ties=True)) == 4


def test_a_source_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--model", "scenes-sd", "--pictures", "own", "scenes-sd"])
    assert "--pictures own scenes-sd: expected each of them once (own is scenes-sd)" in capsys.readouterr().err
