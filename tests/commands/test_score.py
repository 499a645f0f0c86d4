"""``diffusion-align score`` as a user runs it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from PIL import Image

from diffusion_align.cli import main
from diffusion_align.commands.score import MARK, folder_items
from diffusion_align.rewards import load_scorer
from diffusion_align.scenes.make.comparisons import rendered_rows
from diffusion_align.scenes.world.grammar import sample_prompt, sample_scene
from diffusion_align.scenes.world.render import render

NEW = "a large red star on a dark background", "two small blue rings on a light background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rendered scenes and their prompts."""
    folder = tmp_path_factory.mktemp("pictures")
    prompts = []
    for i in range(7):
        rng = np.random.default_rng(i)
        spec = sample_prompt(rng)
        Image.fromarray(render(sample_scene(spec, rng))).save(folder / f"{i:03d}.png")
        prompts.append(spec.text())
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return folder


def score(folder: Path, out: Path, *more: str) -> int:
    prompts = ["--prompts", str(folder / "prompts.txt")]
    return main(["score", str(folder), "--scorers", "scenes-oracle", "--out", str(out), *prompts, *more])


def test_a_folder_becomes_a_table(folder: Path, tmp_path: Path) -> None:
    assert score(folder, tmp_path / "scores.parquet", "--batch-size", "3") == 0
    table = load_dataset("parquet", data_files=str(tmp_path / "scores.parquet"), split="train")
    assert table["image"][:] == [f"{i:03d}.png" for i in range(7)]
    picture = Image.open(folder / "004.png")
    output = load_scorer("scenes-oracle").score([picture], [table["prompt"][4]])
    assert table["scenes-oracle"][4] == pytest.approx(float(output.reward))
    assert table["scenes-oracle/fidelity"][4] == pytest.approx(float(output.aspects["fidelity"]))
    assert not list(tmp_path.glob("*.partial"))


def died(folder: Path, whole: Path, out: Path) -> list[dict[str, Any]]:
    """What a run leaves that dies after three of seven pictures, and the rows that are in it: made recognisable."""
    rows = [json.loads(line) | {"scenes-oracle": -1.0} for line in whole.read_text().splitlines()[:3]]
    items = folder_items(sorted(folder.glob("*.png")), str(folder / "prompts.txt"))
    lines = [{"source": str(folder), "scorers": ["scenes-oracle"]}]
    lines += [{MARK: item.mark()} | row for item, row in zip(items, rows, strict=False)]
    out.with_name(f"{out.name}.partial").write_text("".join(f"{json.dumps(x)}\n" for x in lines) + '{"image": "003')
    return rows


def rows_of(table: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in table.read_text().splitlines()]


def test_a_run_that_died_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    assert score(folder, whole) == 0
    kept = died(folder, whole, resumed)
    assert score(folder, resumed) == 0
    assert rows_of(resumed) == [*kept, *rows_of(whole)[3:]]
    assert not list(tmp_path.glob("*.partial"))


def test_what_changed_since_is_scored_again(folder: Path, tmp_path: Path) -> None:
    """A picture more, another prompt and another picture: every row belongs to its picture and its prompt."""
    whole, resumed, changed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl", tmp_path / "pictures"
    shutil.copytree(folder, changed)
    assert score(changed, whole) == 0
    kept = died(changed, whole, resumed)
    prompts = (changed / "prompts.txt").read_text().splitlines()
    (changed / "prompts.txt").write_text("\n".join([NEW[0], prompts[0], NEW[1], *prompts[2:]]))
    shutil.copy(changed / "005.png", changed / "000-a.png")
    shutil.copy(changed / "006.png", changed / "002.png")
    fresh = tmp_path / "fresh.jsonl"
    assert score(changed, resumed) == 0
    assert score(changed, fresh) == 0
    expected = rows_of(fresh)
    assert [row["image"] for row in expected][:4] == ["000-a.png", "000.png", "001.png", "002.png"]
    expected[1] = kept[0]  # the only one that is what it was
    assert rows_of(resumed) == expected


def test_a_partial_table_of_another_run_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl.partial").write_text(json.dumps({"source": "other", "scorers": ["clip"]}) + "\n")
    assert score(folder, tmp_path / "a.jsonl") == 2
    assert "belongs to a run with another source or other scorers" in capsys.readouterr().err


def test_pick_a_pic_rows_are_two_pictures(tmp_path: Path) -> None:
    rows = rendered_rows(3, seed=5)
    Dataset.from_list(rows).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert main(["score", str(tmp_path), "--scorers", "scenes-oracle", "--out", str(tmp_path / "s.jsonl")]) == 0
    table = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["image"] for row in table] == [f"{i}/jpg_{j}" for i in range(3) for j in range(2)]
    picture = Image.open(io.BytesIO(rows[2]["jpg_1"]))
    expected = float(load_scorer("scenes-oracle").score([picture], [rows[2]["caption"]]).reward)
    assert table[5]["scenes-oracle"] == pytest.approx(expected)


def test_generated_pictures_bring_their_prompts(tmp_path: Path) -> None:
    prompt = "a large red star on a dark background"
    made = ["generate", prompt, "--num-images", "2", "--num-inference-steps", "1", "--out", str(tmp_path / "made")]
    assert main(made) == 0
    assert (
        main(["score", str(tmp_path / "made"), "--scorers", "scenes-oracle", "--out", str(tmp_path / "s.jsonl")]) == 0
    )
    assert [json.loads(line)["prompt"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == [prompt] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scorers", "pickskore"], "unknown scorer 'pickskore' (did you mean 'pickscore'?)"),
        (["--scorers", "scenes-oracle", "--out", "scores.txt"], "--out scores.txt: expected a .parquet or .jsonl file"),
        (["--scorers", "scenes-oracle", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "a.jsonl")]
    assert main(["score", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_without_prompt_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(folder), "--scorers", "scenes-oracle", "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "000.png: no prompt in its metadata; give --prompts" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_pictures_that_cannot_be_decoded_have_no_scores(
    suffix: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others have theirs; the first one is torn, so that the table's columns cannot be read off its first row."""
    assert score(folder, tmp_path / "whole.jsonl") == 0
    whole = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    for name in ("000.png", "004.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:80])
    assert score(folder, tmp_path / f"scores{suffix}", "--batch-size", "3") == 0
    assert "2 of 7 pictures cannot be decoded and have no scores: " in capsys.readouterr().err
    kind = {".parquet": "parquet", ".jsonl": "json"}[suffix]
    table = load_dataset(kind, data_files=str(tmp_path / f"scores{suffix}"), split="train").to_list()
    for i, (row, expected) in enumerate(zip(table, whole, strict=True)):
        assert row["image"] == expected["image"]
        if i in (0, 4):
            assert row["scenes-oracle"] is None
            assert f"00{i}.png cannot be decoded" in row["error"]
        else:
            assert row["scenes-oracle"] == pytest.approx(expected["scenes-oracle"])
            assert row["error"] is None


def test_a_torn_picture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG half")
    (tmp_path / "p.txt").write_text("a cat")
    arguments = ["--scorers", "scenes-oracle", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "a.jsonl")]
    assert main(["score", str(tmp_path), *arguments]) == 2
    assert "a.png cannot be decoded" in capsys.readouterr().err
