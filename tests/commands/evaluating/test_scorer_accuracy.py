"""``evaluate scorer`` against what is known of the pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from diffusion_align.cli import main
from diffusion_align.commands.evaluating import scorer_accuracy
from diffusion_align.commands.evaluating.scorer_accuracy import by_prompt
from diffusion_align.scenes.make.pairs import encode_jpeg
from tests.brightness import Brightness


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pairs whose brighter picture wins, but for one, and a tie; three of them are a ranking. Brightness judges."""
    monkeypatch.setattr(scorer_accuracy, "load_scorer", lambda name, device: Brightness().frozen())

    def grey(level: int) -> bytes:
        return encode_jpeg(np.full((64, 64, 3), level, np.uint8))

    rows: list[dict[str, Any]] = [
        {"levels": (200, 100), "label_0": 1.0, "caption": "a", "ranking_id": "1"},
        {"levels": (50, 200), "label_0": 0.0, "caption": "a", "ranking_id": "1"},
        {"levels": (100, 50), "label_0": 1.0, "caption": "a", "ranking_id": "1"},
        {"levels": (220, 30), "label_0": 0.0, "caption": "b", "ranking_id": "2"},
        {"levels": (90, 90), "label_0": 0.5, "caption": "c", "ranking_id": "3"},
    ]
    for row in rows:
        first, second = row.pop("levels")
        row |= {"jpg_0": grey(first), "jpg_1": grey(second), "label_1": 1 - row["label_0"], "has_label": True}
        row["label_0_looks"] = 1.0 - row["label_0"]
    folder = tmp_path / "pairs"
    folder.mkdir()
    Dataset.from_list(rows).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@pytest.mark.slow
def test_accuracy_ties_rankings_and_calibration_are_told(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["evaluate", "scorer", "bright", "--dataset", str(pairs), "--out", out, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "5 pairs of 3 prompts, 1 ties" in said.out
    assert "chosen on these very pairs" in said.err
    found = json.loads((tmp_path / "out" / "table.json").read_text())["scorers"]["bright"]
    assert found["accuracy/overall"] == 0.75
    assert found["accuracy_with_ties"] == 0.8
    assert found["ranking/3"] == 1.0
    assert found["accuracy_by_prompt"]["mean"] == 0.5  # prompt a is right, b wrong
    assert sum(count for *_, count in found["calibration"]) == 5
    page = (tmp_path / "out" / "report.html").read_text()
    assert "perfect" in page
    again = ["evaluate", "scorer", "bright", "--dataset", str(pairs), "--device", "cpu", "--out", out]
    assert main(again) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main([*again, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scorers"]["bright"] == found


def test_prompts_weigh_alike_however_many_pairs_they_have() -> None:
    differences = np.array([1.0, 1.0, 1.0, -1.0, 0.0])
    labels = np.array([1.0, 1.0, 1.0, 1.0, 0.5])
    found = by_prompt(differences, labels, ["a", "a", "a", "b", "b"])
    assert found is not None
    assert (found.mean, found.count) == (0.5, 2)
    assert by_prompt(differences[4:], labels[4:], ["b"]) is None


def test_a_scorer_must_be_named_and_known(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "scorer", "--scorers", "--dataset", str(pairs)]) == 2
    assert "name at least one scorer" in capsys.readouterr().err
