"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_align.cli import main, parse


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one error line of a command that must fail."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines if not re.search("Loading|^$", line)] == [True]
    return lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "dpo", "--help"], ["demo", "--help"]])
def test_help_takes_under_a_second(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "diffusion_align.cli", *arguments]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    after = os.times()  # processor time, for other tests run beside this one
    assert done.returncode == 0
    assert "diffusion-align" in done.stdout
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_wrong_names_are_met_with_the_nearest_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'trian' (did you mean 'train'?)" in fails(capsys, "trian")
    assert "unknown training method 'dpoo' (did you mean 'dpo'?)" in fails(capsys, "train", "dpoo")


def test_a_recipe_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml: no such file" in fails(capsys, "train", "dpo", "--config", "nowhere.yaml")


def test_values_are_checked_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert "command line: max_steps = 0 is wrong" in fails(capsys, "train", "dpo", "--max-steps", "0")


def test_an_unknown_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "dpo", "--betta", "3"])
    assert stopped.value.code == 2
    assert "--betta" in capsys.readouterr().err


@pytest.mark.slow
def test_flags_override_the_recipe_and_the_dry_run_tells_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dpo", "--config", "scenes_dpo", "--max-steps", "7", "--beta", "3", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for text in (
        "max_steps: 7",
        "beta: 3.0",
        "lora_rank: 16",
        "ties",
        "pairs used",
        "optimiser steps",
        "total, per device",
    ):
        assert text in plan


def test_generate_writes_pictures_that_carry_their_settings(
    sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(sdxl_folder), "--out", str(tmp_path), "--num-inference-steps", "2", "--num-images", "2"]
    assert main(["generate", "a red star", *flags, "--seed", "5"]) == 0
    files = sorted(tmp_path.glob("*.png"))
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    facts = [json.loads(Image.open(file).text["diffusion-align"]) for file in files]  # type: ignore[attr-defined]
    assert [(f["prompt"], f["seed"]) for f in facts] == [("a red star", 5), ("a red star", 6)]


@pytest.mark.slow
def test_a_picture_is_replayed_from_its_record(sdxl_folder: Path, tmp_path: Path) -> None:
    flags = ["--model", str(sdxl_folder), "--num-inference-steps", "3"]
    dynamic = ["--guidance", "dynamic", "--evaluator", "", "--pixel-scorers", "scenes-oracle", "--candidates", "1", "4"]
    prompt = "a large red star on a dark background"
    assert main(["generate", prompt, *flags, *dynamic, "--num-images", "1", "--out", str(tmp_path / "first")]) == 0
    (record,) = (tmp_path / "first").glob("*.json")
    told = json.loads(record.read_text())
    assert set(told["scales"]) <= {1.0, 4.0}
    assert told["nfe"] == 6
    assert len(told["scores"]["scenes-oracle"]) == 3
    (plot,) = (tmp_path / "first" / "schedules").glob("*.png")
    assert len(list((tmp_path / "first").glob("*.png"))) == 1
    assert Image.open(plot).width > 300
    replay = ["--guidance", "replay", "--schedule", str(record), "--out", str(tmp_path / "second")]
    assert main(["generate", *replay, "--model", str(sdxl_folder)]) == 0
    (again,) = (tmp_path / "second").glob("*.png")
    assert np.array_equal(np.array(Image.open(again)), np.array(Image.open(record.with_suffix(".png"))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--guidance", "cosine"],
        ["--guidance", "interval", "--sigma-interval", "0.2", "2"],
        ["--guidance", "list", "--scales", "1", "4"],
        ["--search", "best-of-n", "--scorer", "scenes-oracle", "--particles", "2", "--scheduler", "dpm++"],
        ["--search", "fk", "--scorer", "scenes-oracle", "--particles", "2"],
    ],
    ids=["cosine", "interval", "list", "best-of-n", "fk"],
)
def test_every_way_to_guide_and_steer_is_a_flag_away(flags: list[str], sdxl_folder: Path, tmp_path: Path) -> None:
    basic = ["--model", str(sdxl_folder), "--out", str(tmp_path), "--num-inference-steps", "2", "--num-images", "2"]
    assert main(["generate", "a large red star on a dark background", *basic, *flags]) == 0
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert [record["seed"] for record in records] == [0, 1]
    assert all("reward" in record if "--search" in flags else len(record["scales"]) == 2 for record in records)


def test_guidance_that_is_not_complete_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--guidance replay needs --schedule" in fails(capsys, "generate", "a", "--guidance", "replay")
    missing = str(tmp_path / "no.json")
    assert f"{missing}: no such file" in fails(capsys, "generate", "--guidance", "replay", "--schedule", missing)
    assert "0 scales for --num-inference-steps 25" in fails(capsys, "generate", "a", "--guidance", "list")
    assert "--search fk needs --scorer" in fails(capsys, "generate", "a", "--search", "fk")


def test_generate_wants_one_kind_of_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert "generate needs a prompt, or --prompts FILE" in fails(capsys, "generate")
    assert "--num-images 0: expected at least 1" in fails(capsys, "generate", "a", "--num-images", "0")


@pytest.mark.slow
def test_a_cache_is_made_once_and_trained_from(
    sdxl_folder: Path, pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(sdxl_folder), "--dataset", str(pairs_folder), "--cache-dir", str(tmp_path / "cache")]
    assert main(["cache", *flags]) == 0
    assert "12 pairs" in capsys.readouterr().out
    run = ["--max-steps", "2", "--output-dir", str(tmp_path / "run"), "--report-to", "none", "--no-progress"]
    assert main(["train", "dpo", *flags, *run]) == 0
    assert "trained 2 steps" in capsys.readouterr().out
    assert "cache needs --cache-dir" in fails(capsys, "cache", "--model", str(sdxl_folder))


def test_a_cache_is_for_the_method_of_its_recipe(
    sdxl_folder: Path, pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(sdxl_folder), "--dataset", str(pairs_folder), "--cache-dir", str(tmp_path / "cache")]
    assert main(["cache", "--config", "scenes_sft", *flags]) == 0
    assert "12 pictures" in capsys.readouterr().out
    assert parse(["cache", "--config", "scenes_inpo", "--cache-dir", "c"])[1].method == "inpo"
    assert "method grpo draws its own pictures" in fails(capsys, "cache", "--config", "scenes_grpo", "--cache-dir", "c")


def test_every_public_name_can_be_imported() -> None:
    import diffusion_align

    for name in diffusion_align.__all__:
        assert getattr(diffusion_align, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffusion_align.nothing


@pytest.mark.slow
def test_generate_repaints_a_hole_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[:20, :30] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = ["--image", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png")]
    common = [
        "generate",
        "a red star",
        "--num-inference-steps",
        "2",
        "--num-images",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--overwrite",
    ]
    assert main([*common, "--model", "scenes-inpaint", *given]) == 0
    files = capsys.readouterr().out.split()
    for file in files:
        drawn = np.array(Image.open(file))
        assert (drawn[mask == 0] == picture[mask == 0]).all()
        assert (drawn[mask > 0] != picture[mask > 0]).mean() > 0.9
    assert len(files) == 2
    assert "needs --image and --mask" in fails(capsys, *common, "--model", "scenes-inpaint")
    assert "scenes-sdxl is not one" in fails(capsys, *common, *given)
    Image.fromarray(mask[:32]).save(tmp_path / "mask.png")
    assert "(64, 32)" in fails(capsys, *common, "--model", "scenes-inpaint", *given)
