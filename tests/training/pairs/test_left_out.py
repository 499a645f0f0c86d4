"""Streams in training: bit for bit after a resume, also with the files gone by; what is left out is said and kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.plan import make_plan
from diffusion_align.training.run import train
from tests.data.test_data import rows, written

LONG = " ".join(["red"] * 30)


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(str(sdxl_folder))


@pytest.fixture
def config(sdxl_folder: Path, tmp_path: Path) -> DPOConfig:
    table = rows(24, weight=[1.0] * 24)
    table["caption"] = ["a red star", LONG, "", *["a blue ring"] * 21]
    table["label_0"][3], table["label_1"][3] = 0.5, 0.5
    table["jpg_0"][7] = b"no picture"
    return DPOConfig(
        model=str(sdxl_folder), dataset=str(written(tmp_path / "pairs.parquet", table)), streaming=True, max_steps=12,
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, lora_rank=4, learning_rate=1e-3, beta=500.0,
        report_to="none", progress=False, resolution=16, save_steps=3, save_total_limit=4, shuffle_buffer=8,
        logging_steps=1,
    )  # fmt: skip


def files(folder: str | Path) -> dict[str, Any]:
    found = Path(folder)
    return {name: (found / name).read_text() for name in ("data.json", "corrupt_pairs.jsonl")}


@pytest.mark.slow
def test_a_streamed_run_resumes_bit_for_bit_and_keeps_what_it_left_out(
    config: DPOConfig, adapter: Adapter, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = train(config)
    said = capfd.readouterr().err
    assert "24 rows, 22 pairs used; left out: 1 ties, 1 without caption" in said
    assert f"without caption: {config.dataset}, row 2" in said
    assert "1 captions are longer than the text encoder reads, and are cut" in said
    kept = json.loads((Path(config.output_dir) / "data.json").read_text())
    assert (kept["used"], kept["captions_cut"], kept["counts"]["ties"]) == (22, 1, 1)
    unreadable = json.loads((Path(config.output_dir) / "corrupt_pairs.jsonl").read_text())
    assert unreadable["pair"] == "row 7"
    assert "image cannot be decoded" in unreadable["error"]
    page = (Path(config.output_dir) / "report.html").read_text()
    for name, count in [("ties", 1), ("used", 22), ("captions longer than the text encoder reads", 1)]:
        assert f"<dt>{name}</dt><dd>{count}</dd>" in page
    assert re.search(r"<dt>unreadable, found in this run</dt><dd>[1-9]", page)
    assert f"<li>{config.dataset}, row 2</li>" in page

    parts = replace(config, output_dir=str(tmp_path / "parts"))
    checkpoint = tmp_path / "run" / "checkpoint-00000006"
    resumed = train(replace(parts, resume_from_checkpoint=str(checkpoint)))
    assert resumed.weights is not None
    assert whole.weights is not None
    first, second = load_file(whole.weights), load_file(resumed.weights)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert files(config.output_dir)["data.json"] == files(parts.output_dir)["data.json"]


@pytest.mark.slow
def test_a_dry_run_counts_what_is_streamed(config: DPOConfig, tmp_path: Path) -> None:
    plan = make_plan(config)
    for line in ("rows             24", "ties             1", "pairs used       22", "row 2"):
        assert line in plan
    table = rows(6, label_0=[1.0, 0.0, 7.0, 0.0, 1.0, 0.0])
    wrong = replace(config, dataset=str(written(tmp_path / "wrong.parquet", table)))
    with pytest.raises(ValueError, match=r"wrong\.parquet, row 2: label_0 = 7\.0 is wrong"):
        make_plan(wrong)


def test_pairs_of_small_buckets_are_counted(
    sdxl_folder: Path, adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for number in range(7):
        for side in "ab":
            size = (128, 128) if number < 4 else (160, 96)
            Image.new("RGB", size).save(tmp_path / f"{number}{side}.png")
        lines.append({"chosen": f"{number}a.png", "rejected": f"{number}b.png", "caption": "x"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DPOConfig(
        model=str(sdxl_folder), dataset=str(tmp_path), resolution=128, aspect_ratio_buckets=True,
        per_device_train_batch_size=4, output_dir=str(tmp_path / "none"),
    )  # fmt: skip
    build_pair_source(config, adapter)
    said = capsys.readouterr().err
    assert "3 pairs are never used: their aspect-ratio buckets hold less than a batch of all processes (3 of " in said


@pytest.mark.parametrize("change", [lambda config: replace(config, streaming=False), lambda config: config])
def test_other_ways_to_read_are_refused_on_resume(
    change: Callable[[DPOConfig], DPOConfig], config: DPOConfig, adapter: Adapter
) -> None:
    """A position of one kind of loader is no position of the other."""
    streamed, other = change(config), replace(config, streaming=not change(config).streaming)
    position = build_pair_source(streamed, adapter).state_dict()
    with pytest.raises(ValueError, match="set streaming to"):
        build_pair_source(other, adapter).load_state_dict(position)
