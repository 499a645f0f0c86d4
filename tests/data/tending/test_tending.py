"""Checks, duplicates, splits and figures of data sets of pairs."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_align.cli import main
from diffusion_align.data import load_pairs
from diffusion_align.data.tending.checked import check_pairs
from diffusion_align.data.tending.deduplicated import find_duplicates
from diffusion_align.data.tending.divided import divide
from diffusion_align.data.tending.duplicates import NEAR, difference_hash, groups_of, near_pairs
from diffusion_align.data.tending.pair_figures import pair_figures
from diffusion_align.data.tending.raw_pairs import splits_of

from .pictures import picture


def pair(first: bytes, second: bytes, caption: str, label: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {"jpg_0": first, "jpg_1": second, "caption": caption, "label_0": label, **more}


def write(folder: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Train: a pair, its repetition turned round, its contradiction, one picture twice, a torn picture, a tie. Test: a
    prompt and a picture of train."""
    torn = picture(5)[:60]
    rows = [
        pair(picture(1), picture(2), "A fox"), pair(picture(2), picture(1), "a  FOX", 0.0),
        pair(picture(1), picture(2), "a fox", 0.0), pair(picture(3), picture(3), "a cat"),
        pair(torn, picture(4), "a dog"), pair(picture(6), picture(7), "a tree", 0.5),
    ]  # fmt: skip
    write(tmp_path / "set", "test", [pair(picture(8), picture(7), "a Fox"), pair(picture(9), picture(10), "a boat")])
    return write(tmp_path / "set", "train", rows)


def test_a_check_names_what_must_be_mended(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check_pairs(messy, splits_of(messy, ("train", "validation", "test")))
    assert found.splits == {"train": 6, "test": 2}
    assert found.totals == {
        "corrupt": 1, "leaked_prompts": 1, "leaked_pictures": 1, "repeated": 1, "contradicting": 1, "identical": 1,
    }  # fmt: skip
    assert "row 4, column jpg_0 cannot be decoded" in found.corrupt[0]
    assert found.leaked_prompts == ["'a fox' is in test and train"]
    assert found.counts["ties"] == 1
    assert main(["data", "check", str(messy)]) == 1
    assert "1 pictures in two splits" in capsys.readouterr().out
    assert main(["data", "check", str(messy), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] is True


def test_a_check_of_a_sound_set_ends_with_0(pairs_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(pairs_folder), "--splits", "train"]) == 0
    assert capsys.readouterr().out.endswith("nothing that must be mended\n")


def test_duplicates_are_left_out_and_contradictions_with_them(
    messy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find_duplicates(messy, "train")
    assert found.keep == [5]
    counts = {"repeated": 1, "contradicting": 1, "identical pictures": 1, "corrupt": 1}
    assert {name: found.counts[name] for name in counts} == counts
    assert main(["data", "dedup", str(messy), "--out", str(tmp_path / "out")]) == 0
    assert "1 kept" in capsys.readouterr().out
    kept = load_pairs(tmp_path / "out", keep_ties=True)
    assert [kept[i].caption for i in range(kept.used)] == ["a tree"]
    assert main(["data", "dedup", str(messy), "--out", str(tmp_path / "out")]) == 2
    assert "is not empty: give a new folder" in capsys.readouterr().err


def test_copies_of_a_picture_are_near_and_others_are_not(tmp_path: Path) -> None:
    whole = Image.open(io.BytesIO(picture(1, side=96))).convert("RGB")
    buffer = io.BytesIO()
    whole.resize((64, 64), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=70)
    hashes = [difference_hash(content, "") for content in (picture(1, side=96), buffer.getvalue(), picture(2))]
    assert (hashes[0] ^ hashes[1]).bit_count() <= NEAR < (hashes[0] ^ hashes[2]).bit_count()
    rows = [pair(picture(1, side=96), picture(2), "a fox"), pair(buffer.getvalue(), picture(2), "a fox")]
    assert find_duplicates(write(tmp_path / "set", "train", rows), "train").keep == [0]
    assert find_duplicates(tmp_path / "set", "train", near=False).keep == [0, 1]


def test_near_pairs_are_those_that_a_comparison_of_all_finds() -> None:
    rng = np.random.default_rng(0)
    base = [int(value) for value in rng.integers(0, 2**63, 40)]
    changes = [sum(1 << int(bit) for bit in rng.choice(64, 1 + i % 6, False)) for i in range(len(base))]
    hashes = base + [value ^ change for value, change in zip(base, changes, strict=True)]
    expected = {
        (i, j) for j in range(len(hashes)) for i in range(j) if (hashes[i] ^ hashes[j]).bit_count() <= NEAR
    }  # fmt: skip
    assert set(near_pairs(hashes)) == expected
    assert groups_of(5, iter([(3, 4), (1, 3)])) == [0, 1, 2, 1, 1]


def test_splits_share_neither_prompt_nor_picture(tmp_path: Path) -> None:
    rows = [pair(picture(3 * i), picture(3 * i + 1), f"prompt {i // 2}") for i in range(40)]
    rows += [pair(picture(0), picture(500), "prompt 99")]  # a picture of prompt 0
    folder = write(tmp_path / "set", "train", rows)
    counts = divide(folder, "train", {"test": 0.2, "validation": 0.2}, 0, tmp_path / "out")
    assert counts.keys() == {"train", "test", "validation", "corrupt"}
    assert sum(counts.values()) == 41
    checked = check_pairs(tmp_path / "out", ["train", "test", "validation"])
    assert not checked.failed
    again = divide(folder, "train", {"test": 0.2, "validation": 0.2}, 0, tmp_path / "again")
    assert again == counts
    with pytest.raises(ValueError, match="gets none of 1 pairs"):
        divide(write(tmp_path / "one", "train", rows[:1]), "train", {"test": 0.5}, 0, tmp_path / "none")


def test_figures_tell_labels_prompts_people_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"user_id": "u", "model_0": "a", "model_1": "b", "label_0_style": 1.0}
    rows = [pair(picture(i), picture(i + 1), "a fox", label, **facts) for i, label in enumerate((1.0, 0.5, 0.0, 1.0))]
    found = pair_figures(write(tmp_path / "set", "train", rows), "train", sizes=2)
    assert (found["pairs"], found["used"], found["ties"], found["users"]) == (4, 3, 1, 1)
    assert found["first preferred"] == pytest.approx(2 / 3)
    assert found["models"]["a"] == {"comparisons": 4, "won": 0.625}
    assert found["aspects"] == ["style"]
    assert found["prompts"]["most frequent"] == {"a fox": 4}
    assert found["sizes"] == {"24x24": 4}
    assert main(["data", "stats", str(tmp_path / "set"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 4
    assert main(["data", "stats", "scenes-pairs"]) == 0
    assert "pairs: 1,000" in capsys.readouterr().out


@pytest.mark.slow
def test_figures_of_100k_rows_take_seconds_and_read_no_picture(tmp_path: Path) -> None:
    count = 100_000
    columns = {
        "jpg_0": [b"no picture"] * count, "jpg_1": [b"neither"] * count,
        "caption": [f"prompt {i % 5000}" for i in range(count)], "label_0": [float(i % 2) for i in range(count)],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    begun = time.process_time()
    assert pair_figures(tmp_path, "train")["prompts"]["distinct"] == 5000
    assert time.process_time() - begun < 10


def test_what_cannot_be_asked_is_said(messy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["data", "split", str(messy), *out, "--test", "0.7", "--validation", "0.3"]) == 2
    assert "shares that come to more than 0 and less than 1" in capsys.readouterr().err
    assert main(["data", "import", str(messy / "nowhere"), *out]) == 2
    assert main(["data", "imprt", "x"]) == 2
    assert "did you mean 'import'" in capsys.readouterr().err
