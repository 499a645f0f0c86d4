"""The Data page: ten thousand pairs, filters, exclusions, and pictures that cannot be read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.studio.material import encoded, scored_table
from tests.studio.serving import studio, studio_here
from tests.studio.test_label_page import entered

pytestmark = pytest.mark.slow


def large_table(folder: Path, count: int) -> None:
    """Many pairs of few pictures, stored one by one."""
    folder.mkdir()
    pool = [encoded(60 + number, number, 384) for number in range(64)]
    columns = {
        "caption": [f"prompt number {number % 4000}" for number in range(count)],
        "jpg_0": [pool[number % 64] for number in range(count)],
        "jpg_1": [pool[(number * 7 + 1) % 64] for number in range(count)],
        "label_0": [(1.0, 0.0, 0.5)[number % 3] for number in range(count)],
    }
    path = folder / "train-00000-of-00001.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=1000, use_dictionary=False, compression="none")


def test_ten_thousand_pairs_scroll_in_bounded_memory(browser: Any, tmp_path: Path) -> None:
    large_table(tmp_path / "pairs", 10_000)
    with studio(tmp_path) as running:
        page = entered(browser, running, "/data", viewport={"width": 1280, "height": 800})
        page.locator(".tile img").first.wait_for()
        server = psutil.Process(running.process.pid)
        before = server.memory_info().rss
        waits = []
        for _ in range(3):  # the machine may be busy with other tests
            start = time.perf_counter()
            page.reload(wait_until="commit")
            page.locator(".tile img").first.wait_for()
            waits.append(time.perf_counter() - start)
        assert min(waits) <= 1, waits
        most = 0
        for place in range(0, 2500 * 196, 60_000):
            page.mouse.wheel(0, 60_000 if place else 0)
            page.wait_for_timeout(200)
            most = max(most, page.locator(".tile").count())
        page.keyboard.press("End")
        page.locator("[data-row='9999'] img").first.wait_for()
        assert 12 <= most <= 200
        assert server.memory_info().rss - before <= 100 * 2**20, server.memory_info()
        assert page.locator("#shown").inner_text() == "10,000 pairs"
        assert not page.wrong


def test_a_torn_picture_is_a_tile_that_names_row_and_column(browser: Any, tmp_path: Path) -> None:
    file = scored_table(tmp_path / "pairs", 3, 64) / "train-00000-of-00001.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[1]["jpg_1"] = rows[1]["jpg_1"][: len(rows[1]["jpg_1"]) // 2]
    pq.write_table(pa.Table.from_pylist(rows), file)
    with studio_here(tmp_path) as running:
        page = entered(browser, running, "/data")
        page.locator(".tile .broken", has_text="row 1, column jpg_1").wait_for()
        assert page.locator(".tile .broken").count() == 1


def test_filters_and_the_exclusion_list(browser: Any, tmp_path: Path) -> None:
    folder = scored_table(tmp_path / "pairs", 12, 32)
    table = folder / "train-00000-of-00001.parquet"
    before = table.read_bytes()
    with studio_here(tmp_path) as running:
        page = entered(browser, running, "/data")
        page.get_by_label("Prompt").fill("number 11 ")
        page.locator("#shown", has_text="1 of 12 pairs").wait_for()
        page.locator(".tile button").click()
        page.get_by_role("button", name="Exclude").click()
        page.get_by_role("button", name="Take off the exclusion list").wait_for()
        page.keyboard.press("Escape")
        page.locator(".tile.out").wait_for()
        assert not page.wrong
        listed = json.loads((folder / "excluded.json").read_text())
        assert listed == {"excluded": [{"file": table.name, "row": 11}]}

        def count(**filters: Any) -> int:
            return int(running.ask("data-page", table="pairs", **filters)["count"])

        assert count(excluded=True) == 1
        assert count(label="tie") == 12
        assert count(label="first") == 0
        assert count(gap=0.305, scorer="pickscore") == 6  # 0.25 + n / 100
        assert count(duplicates=True) == count(corrupt=True) == 0
        assert running.post("data-page", table="pairs", gap=1, scorer="nobody").status == 400
        assert running.ask("data-exclude", table="pairs", row=11)["count"] == 0
        counts = running.ask("data-counts", table="pairs")
        assert (counts["rows"], counts["sizes"]) == (12, [["32×32", 24]])
    assert table.read_bytes() == before


def test_thumbnails_are_kept_within_a_bound(tmp_path: Path) -> None:
    from diffusion_align.studio.serving.thumbnails import Thumbnails
    from diffusion_align.studio.sources.parquet_cells import ParquetCells
    from diffusion_align.studio.sources.units import Picture

    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(encoded(50, number, 64, "PNG"))
    kept = Thumbnails(tmp_path / "kept", ParquetCells(), most_bytes=2000)
    made = [kept.read(Picture(tmp_path / f"{number}.png")) for number in range(6)]
    there = list((tmp_path / "kept").iterdir())
    assert 0 < sum(file.stat().st_size for file in there) <= 2000
    assert len(there) < 6
    assert kept.read(Picture(tmp_path / "5.png")) == made[5]


def test_cells_are_kept_within_a_bound_also_those_of_the_hub(tmp_path: Path) -> None:
    from diffusion_align.studio.sources.parquet_cells import ROWS, ParquetCells

    contents = [bytes([number]) * 100 for number in range(4 * ROWS)]
    file = tmp_path / "hub.parquet"
    pq.write_table(pa.table({"jpg_0": [{"bytes": content, "path": "a.jpg"} for content in contents]}), file)
    cells = ParquetCells(most_bytes=2 * ROWS * 100)
    assert [cells.read(file, row, "jpg_0") for row in range(len(contents))] == contents
    assert cells.held == 2 * ROWS * 100
