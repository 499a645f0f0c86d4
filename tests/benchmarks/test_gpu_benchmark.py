"""The GPU benchmark on a CPU, so that it works on the day when there is a GPU for a quarter of an hour."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import performance_page as page
from benchmarks.gpu.command import STAGES, attempt, main, run_stages
from benchmarks.gpu.measure import kind_of
from benchmarks.gpu.reference import find_out
from benchmarks.gpu.rows import Finding, Goal, Row, Stage
from benchmarks.gpu.workshop import SMALL, TRUE, Workshop


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(SMALL, torch.device("cpu"), tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What a small run writes, and the processor seconds that it takes."""
    folder, started = tmp_path_factory.mktemp("gpu"), time.process_time()
    main(["--small", "--budget", "3600", "--out", str(folder)])  # however busy the machine is
    return json.loads((folder / "gpu.json").read_text()), time.process_time() - started


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for stage in record["stages"].values() for row in stage["rows"]]


@pytest.mark.slow
def test_every_row_of_every_stage_runs(small: tuple[dict[str, Any], float]) -> None:
    record, _ = small
    assert list(record["stages"]) == [stage.key for stage in STAGES]
    assert {row["row"]: row["error"]["message"] for row in rows_of(record) if row["error"] is not None} == {}
    skipped = {row["row"] for row in rows_of(record) if row["skipped"] is not None}
    assert skipped <= {"xformers", "all weights, adamw_8bit"}  # packages that may be missing


@pytest.mark.slow
def test_a_small_run_takes_well_under_three_minutes_of_one_core(small: tuple[dict[str, Any], float]) -> None:
    assert small[1] < 120


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_what_only_a_gpu_can_say_is_left_open(small: tuple[dict[str, Any], float]) -> None:
    step = small[0]["stages"]["step"]["rows"][0]
    assert step["figures"]["peak_gib"] is None
    assert step["figures"]["host_waits"] is None
    assert step["notes"]
    judged = [goal for row in rows_of(small[0]) for goal in row["goals"] if "memory" in goal["text"]]
    assert judged
    assert all(goal["met"] is None and goal["reason"] for goal in judged)


@pytest.mark.slow
def test_the_product_gives_the_same_losses_and_pictures(small: tuple[dict[str, Any], float]) -> None:
    goals = [goal for row in small[0]["stages"]["product"]["rows"] for goal in row["goals"]]
    assert len(goals) >= 6
    assert all(goal["met"] for goal in goals)


@pytest.mark.slow
def test_a_row_that_fails_is_recorded_and_the_next_one_runs(shop: Workshop) -> None:
    def broken(shop: Workshop) -> Finding:
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = [Row("broken", 0, broken), Row("whole", 0, lambda shop: Finding({"one": 1}))]
    record = run_stages([Stage("stage", "Stage", lambda shop: rows)], shop, 480, shop.folder / "gpu.json")
    first, second = record["stages"]["stage"]["rows"]
    assert first["error"]["type"] == "OutOfMemoryError"
    assert any("raise" in line for line in first["error"]["traceback"])
    assert second["figures"] == {"one": 1}


@pytest.mark.slow
def test_rows_that_no_longer_fit_are_skipped(shop: Workshop) -> None:
    shop.scale = replace(SMALL, true_size=True)
    row = Row("long", 60, lambda shop: Finding({}))
    stage = Stage("stage", "Stage", lambda shop: [row])
    assert "budget" in str(attempt(stage, row, shop, left=59).skipped)
    assert attempt(stage, row, shop, left=61).skipped is None


@pytest.mark.slow
def test_the_file_is_whole_after_every_stage(shop: Workshop) -> None:
    out, seen = shop.folder / "gpu.json", []

    def look(shop: Workshop) -> Finding:
        seen.append(list(json.loads(out.read_text())["stages"]) if out.is_file() else [])
        return Finding({})

    stages = [Stage(key, key, lambda shop: [Row("row", 0, look)]) for key in ("first", "second")]
    run_stages(stages, shop, 480, out)
    assert seen == [[], ["first"]]


def test_expected_seconds_fit_the_default_budget(shop: Workshop) -> None:
    shop.scale = TRUE
    needed = sum(row.seconds for stage in STAGES for row in stage.rows(shop) if row.needs is None)
    assert needed <= 560


def test_without_a_gpu_true_size_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "--small" in capsys.readouterr().err


def test_the_page_is_what_the_command_makes() -> None:
    assert page.PAGE.read_text() == page.render(page.read_record(page.RESULT))


@pytest.mark.slow
def test_the_page_shows_goals_and_says_what_was_missed(small: tuple[dict[str, Any], float]) -> None:
    record = json.loads(json.dumps(small[0]))
    row = record["stages"]["step"]["rows"][0]
    row["goals"] = [vars(Goal.at_least("half of the matmul peak", 0.4, 0.5))]
    text = page.render(record)
    assert f"| half of the matmul peak | 0 of 3 | 0.4 ({row['row']}) | missed |" in text
    assert "Where the time of a step goes" in text
    assert "needs a GPU" in text


@pytest.mark.slow
def test_a_small_run_is_no_result(tmp_path: Path, small: tuple[dict[str, Any], float]) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(small[0]))
    with pytest.raises(ValueError, match="--small"):
        page.read_record(tmp_path / "gpu.json")


@pytest.mark.slow
def test_memory_of_the_true_size_is_estimated_without_weights(tmp_path: Path) -> None:
    """What a GPU's measurements are compared with: an answer that fails would only be missed there."""
    gib = find_out("memory-1", TRUE, tmp_path)
    assert 5 < gib["full"] < gib["attention"] < gib["none"] < 80


def test_kernels_are_told_apart_by_their_names() -> None:
    names = {
        "void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolution",
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT": "matmul",
        "void at::native::RowwiseMomentsCUDAKernel<float>": "norm",
        "Memcpy HtoD (Pinned -> Device)": "copy",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>": "elementwise",
    }
    assert {name: kind_of(name) for name in names} == names
