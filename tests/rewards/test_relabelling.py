"""Pairs with new labels: by a scorer, once, in files that training reads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from PIL import Image
from torch import Tensor

from diffusion_align.cli import main
from diffusion_align.data import load_pairs
from diffusion_align.rewards import RewardOutput, RewardScorer, load_scorer
from diffusion_align.rewards.relabelling import Relabelling, relabel


class Brightness(RewardScorer):
    """Mean of all pixels, 0 to 255; counts the pictures that it was shown."""

    name = "brightness"

    def __init__(self, higher_is_better: bool = True) -> None:
        super().__init__()
        self.higher_is_better, self.seen = higher_is_better, 0

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        self.seen += len(images)
        return RewardOutput(255 * images.mean(dim=(1, 2, 3)))


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


#: Greys of both pictures and the label of each row.
ROWS: list[tuple[int, int, float | None]] = [
    (10, 90, 1.0), (90, 10, 1.0), (50, 50, 0.0), (10, 12, 0.5), (200, 100, None), (30, 31, 0.0), (77, 7, 0.0),
]  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Path:
    columns = {
        "jpg_0": [png(first) for first, _, _ in ROWS],
        "jpg_1": [png(second) for _, second, _ in ROWS],
        "caption": [f"row {i}" for i in range(len(ROWS))],
        "label_0": [label for _, _, label in ROWS],
        "has_label": [label is not None for _, _, label in ROWS],
        "image_0_uid": [f"{i}a" for i in range(len(ROWS))],
        "image_1_uid": [f"{i}b" for i in range(len(ROWS))],
        "best_image_uid": ["old"] * len(ROWS),
        "weight": [1.0 + i for i in range(len(ROWS))],
    }
    Dataset.from_dict(columns).to_parquet(tmp_path / "pairs" / "train-00000-of-00001.parquet")
    return tmp_path / "pairs"


def read(out: Path) -> Any:
    files = [str(path) for path in sorted(out.glob("train-*.parquet"))]
    return load_dataset("parquet", data_files=files, split="train")


def by_hand(first: int, second: int, margin: float, sign: int = 1) -> float:
    """The official code flips if the second score is larger; here equal ones, and near ones, are ties."""
    gap = sign * (first - second)
    return 0.5 if abs(gap) <= margin else float(gap > 0)


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_labels_are_the_scorer_s_and_the_old_ones_are_kept(
    table: Path, tmp_path: Path, margin: float, higher: bool
) -> None:
    scorer = Brightness(higher)
    task = Relabelling(str(table), "train", "brightness", margin, shard_size=3)
    found = relabel(task, scorer, tmp_path / "out", batch_size=2)
    rows = read(tmp_path / "out")
    expected = [by_hand(first, second, margin, 1 if higher else -1) for first, second, _ in ROWS]
    assert rows["label_0"][:] == expected
    assert rows["label_1"][:] == [1 - label for label in expected]
    assert rows["original_label_0"][:] == [label for _, _, label in ROWS]
    assert rows["has_label"][:] == [True] * len(ROWS)
    assert rows["weight"][:] == [1.0 + i for i in range(len(ROWS))]
    assert rows["best_image_uid"][:] == [{1: f"{i}a", 0: f"{i}b"}.get(e, "none") for i, e in enumerate(expected)]
    np.testing.assert_allclose(rows["score_0"][:], [first for first, _, _ in ROWS], rtol=1e-5)
    np.testing.assert_allclose(rows["score_1"][:], [second for _, second, _ in ROWS], rtol=1e-5)
    both = [(old, new) for (_, _, old), new in zip(ROWS, expected, strict=True)]
    decisive = [(old, new) for old, new in both if old in (0, 1) and new != 0.5]
    assert found["pairs"] == len(ROWS)
    assert found["ties"] == sum(new == 0.5 for _, new in both)
    assert found["flipped"] == sum(old != new for old, new in decisive)
    assert found["agreeing"] == sum(old == new for old, new in decisive)
    assert found["decided"] == sum(old in (0.5, None) and new != 0.5 for old, new in both)
    assert found["undecided"] == sum(old in (0, 1) and new == 0.5 for old, new in both)
    assert found["margin_50"] == pytest.approx(np.median([abs(first - second) for first, second, _ in ROWS]), rel=1e-4)
    pairs: Any = load_pairs(tmp_path / "out")
    assert len(pairs) == len(ROWS) - found["ties"]
    for i in range(len(pairs)):
        better, worse = (image.getpixel((0, 0))[0] for image in pairs[i].images())
        assert (better > worse) == higher


def test_soft_labels_are_the_probabilities_of_bradley_and_terry(table: Path, tmp_path: Path) -> None:
    task = Relabelling(str(table), "train", "brightness", temperature=20.0)
    relabel(task, Brightness(), tmp_path / "out")
    probabilities = [1 / (1 + np.exp(-(first - second) / 20)) for first, second, _ in ROWS]
    np.testing.assert_allclose(read(tmp_path / "out")["soft_label_0"][:], probabilities, rtol=1e-5)
    for streaming in (False, True):
        pairs: Any = load_pairs(tmp_path / "out", streaming=streaming)
        found = [pairs[i] for i in range(len(pairs))] if not streaming else list(pairs)
        expected = [max(p, 1 - p) for p in probabilities if p != 0.5]
        assert [record.preference for record in found] == pytest.approx(expected, rel=1e-5)
    rows = Dataset.from_dict(
        {"jpg_0": [b""], "jpg_1": [b""], "caption": ["a"], "label_0": [1.0], "soft_label_0": [2.0]}
    )
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"row 0: soft_label_0 = 2.0 is wrong: expected a number in \[0, 1\]"):
        load_pairs(tmp_path / "train.parquet")


def test_a_run_that_died_scores_only_what_is_missing(table: Path, tmp_path: Path) -> None:
    task, whole, out = Relabelling(str(table), "train", "brightness", shard_size=2), Brightness(), tmp_path / "out"
    relabel(task, whole, tmp_path / "whole")
    relabel(task, Brightness(), out)
    assert [path.name for path in sorted(out.glob("*.parquet"))] == [f"train-0000{i}.parquet" for i in range(4)]
    (out / "train-00001.parquet").unlink()
    (out / ".train-00001.parquet.partial").write_bytes(b"torn")
    again = Brightness()
    relabel(task, again, out)
    assert (whole.seen, again.seen) == (2 * len(ROWS), 4)
    assert read(out).to_dict() == read(tmp_path / "whole").to_dict()
    with pytest.raises(ValueError, match="out was begun with another tie_margin: delete it"):
        relabel(Relabelling(str(table), "train", "brightness", 1.0, shard_size=2), Brightness(), out)


def test_streams_and_tables_get_the_same_labels(table: Path, tmp_path: Path) -> None:
    relabel(Relabelling(str(table), "train", "brightness", shard_size=2), Brightness(), tmp_path / "table")
    stream = Relabelling(str(table), "train", "brightness", streaming=True, shard_size=2)
    relabel(stream, Brightness(), tmp_path / "stream")
    (tmp_path / "stream" / "train-00002.parquet").unlink()
    relabel(stream, Brightness(), tmp_path / "stream")
    assert read(tmp_path / "stream").to_dict() == read(tmp_path / "table").to_dict()
    few = relabel(Relabelling(str(table), "train", "brightness", limit=3, seed=1), Brightness(), tmp_path / "few")
    assert few["pairs"] == 3


def folder_of_pairs(folder: Path, corrupt: int = 0) -> Path:
    folder.mkdir()
    rows = []
    for i, (first, second, _) in enumerate(ROWS):
        for name, grey in (("chosen", first), ("rejected", second)):
            (folder / f"{name}{i}.png").write_bytes(png(grey) if i >= corrupt else b"no picture")
        rows.append({"chosen": f"chosen{i}.png", "rejected": f"rejected{i}.png", "caption": f"row {i}"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row | {"preference": 0.9}) for row in rows))
    return folder


def test_a_folder_of_pictures_becomes_a_table_and_unreadable_pairs_are_left_out(tmp_path: Path) -> None:
    task = Relabelling(str(folder_of_pairs(tmp_path / "pairs", corrupt=2)), "train", "brightness", shard_size=3)
    for _ in range(2):  # finished, it says the same again
        assert relabel(task, Brightness(), tmp_path / "out")["unreadable"] == 2
    lines = (tmp_path / "out" / "unreadable.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == ["row 0", "row 1"]
    rows = read(tmp_path / "out")
    assert rows["caption"][:] == [f"row {i}" for i in range(2, len(ROWS))]
    assert rows["original_label_0"][:] == [0.9] * (len(ROWS) - 2)
    assert rows["label_0"][:] == [by_hand(first, second, 0) for first, second, _ in ROWS[2:]]
    with pytest.raises(ValueError, match="more than max_corrupt = 1 pairs cannot be decoded"):
        relabel(task, Brightness(), tmp_path / "other", max_corrupt=1)


def test_the_command_says_what_became_of_the_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--scorer", "scenes-oracle", "--out", str(out), "--split", "validation", "--max-pairs", "6"]
    assert main(["data", "relabel", "scenes-pairs", *flags]) == 0
    said = capsys.readouterr().out
    assert "6 pairs: " in said
    assert " flipped, " in said
    assert "margins between the two scores, up to: 10% " in said
    oracle, pairs = load_scorer("scenes-oracle"), load_pairs(out, "validation")
    rewards = oracle.score(list(pairs[0].images()), [pairs[0].caption] * 2).reward  # type: ignore[index]
    assert rewards[0] > rewards[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scorer", "edit-reward", "--out", "x"], "edit-reward"),
        (["--scorer", "scenes-oracle", "--out", "x", "--tie-margin", "-1"], "--tie-margin -1.0: expected at least 0"),
        (["--scorer", "scenes-oracle", "--out", "x", "--max-pairs", "0"], "--max-pairs 0: expected at least 1"),
        (["--scorer", "scenes-oracl", "--out", "x"], "scenes-oracl"),
    ],
)
def test_what_cannot_be_done_is_one_error(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "relabel", "scenes-pairs", *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_second_word_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "relable"]) == 2
    assert "unknown data command 'relable' (did you mean 'relabel'?)" in capsys.readouterr().err
