"""The Label page in a real browser."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.studio.material import picture_folders, scored_table
from tests.studio.serving import Studio, studio, studio_here

pytestmark = pytest.mark.slow


def entered(browser: Any, running: Studio, path: str = "/label", **options: Any) -> Any:
    """A tab on a page of the studio, which fails on every request to elsewhere and every error on the page."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(running.origin) or page.wrong.append(request.url))
    page.goto(running.address)
    if path != "/label":
        page.goto(running.origin + path)
    return page


def judge(page: Any, key: str) -> float:
    """Press a key and wait for the next pair; seconds."""
    page.locator("body[data-visit]").wait_for()
    before = page.locator("body").get_attribute("data-visit")
    start = time.perf_counter()
    page.keyboard.press(key)
    page.locator(f"body:not([data-visit='{before}'])").wait_for()
    return time.perf_counter() - start


def test_a_hundred_labels_by_keyboard_at_thirty_a_minute(browser: Any, tmp_path: Path) -> None:
    scored_table(tmp_path / "pairs", 104, size=512)
    with studio_here(tmp_path, source=(str(tmp_path / "pairs"),), annotator="ada") as running:
        page = entered(browser, running, viewport={"width": 1280, "height": 800})
        page.locator(".stage img").first.wait_for()
        start = time.perf_counter()
        waits = [judge(page, ("ArrowLeft", "ArrowRight", "ArrowDown", "b")[i % 4]) for i in range(100)]
        assert 100 / (time.perf_counter() - start) * 60 >= 30
        assert float(np.quantile(waits, 0.95)) <= 0.25
        assert page.locator("#count").inner_text().startswith("100 of ")
        assert not page.wrong
    rows = [json.loads(line) for line in (tmp_path / "labels" / "ada.jsonl").read_text().splitlines()]
    assert len([row for row in rows if row["event"] == "verdict"]) == 100


def test_undo_skip_help_zoom_summary_and_export(browser: Any, tmp_path: Path) -> None:
    scored_table(tmp_path / "pairs", 6, size=64)
    options: dict[str, Any] = {"source": (str(tmp_path / "pairs"),), "annotator": "ada"}
    with studio_here(tmp_path, **options) as running:
        page = entered(browser, running)
        page.locator(".stage img").first.wait_for()
        first = page.locator(".prompt").inner_text()
        judge(page, "ArrowLeft")
        judge(page, "ArrowRight")
    with studio_here(tmp_path, **options) as running:  # undo goes over a restart
        page = entered(browser, running)
        page.locator(".stage img").first.wait_for()
        judge(page, "u")
        judge(page, "u")
        assert page.locator(".prompt").inner_text() == first
        page.keyboard.press("?")
        page.get_by_role("heading", name="Keys").wait_for()
        page.keyboard.press("Escape")
        page.keyboard.press("z")
        page.locator("dialog.zoom img").nth(1).wait_for()
        page.keyboard.press("+")
        places = {
            page.locator("dialog.zoom img").nth(side).evaluate("image => image.style.transform") for side in (0, 1)
        }
        assert len(places) == 1  # both show the same part
        assert "scale(1.5)" in places.pop()
        page.keyboard.down(" ")
        page.locator("dialog.zoom .flicker").wait_for()
        page.keyboard.up(" ")
        page.keyboard.press("z")
        for key in ("s", "ArrowDown", "b", "ArrowLeft", "ArrowRight", "ArrowLeft"):
            judge(page, key)
        page.get_by_role("heading", name="Nothing left to judge").wait_for()
        page.get_by_role("button", name="Summary and export").click()
        page.locator("dialog td", has_text="secret-model-one").wait_for()
        page.locator("#export").click()
        page.locator("#exported", has_text="5 pairs in train").wait_for()
        assert not page.wrong
    rows = pq.read_table(tmp_path / "labels-pairs").to_pylist()
    assert sum(row["label_0"] == 0.5 for row in rows) == 2


def test_aspects_and_words_are_asked(browser: Any, tmp_path: Path) -> None:
    scored_table(tmp_path / "pairs", 2, size=64)
    options: dict[str, Any] = {"annotator": "ada", "words": True, "aspects": ("light", "detail")}
    with studio_here(tmp_path, source=(str(tmp_path / "pairs"),), **options) as running:
        page = entered(browser, running)
        page.locator(".words button", has_text="red").first.click()
        page.locator("body[data-visit]").wait_for()  # keys judge nothing before the pictures are there
        page.keyboard.press("ArrowLeft")
        page.locator(".aspects .current", has_text="light").wait_for()
        page.keyboard.press("1")
        page.keyboard.press("3")
        judge(page, "Enter")
    (row,) = [json.loads(line) for line in (tmp_path / "labels" / "ada.jsonl").read_text().splitlines()][1:]
    assert row["aspects"] == {"light": 1.0, "detail": 0.0}
    assert row["wrong_words"] == [[2], []]


def test_the_best_and_the_worst_of_four(browser: Any, tmp_path: Path) -> None:
    folders = picture_folders(tmp_path, ("a", "b", "c", "d"), 2)
    with studio_here(tmp_path, source=tuple(map(str, folders)), kind="best-worst", annotator="ada") as running:
        page = entered(browser, running)
        page.locator(".stage img").nth(3).wait_for()
        page.locator("body[data-visit]").wait_for()
        page.keyboard.press("2")
        page.locator(".pick.chosen").wait_for()
        judge(page, "4")
    (row,) = [json.loads(line) for line in (tmp_path / "labels" / "ada.jsonl").read_text().splitlines()][1:]
    assert (row["best"], row["worst"]) == (row["shown"][1], row["shown"][3])


def test_a_task_is_begun_on_the_page(browser: Any, tmp_path: Path) -> None:
    scored_table(tmp_path / "pairs", 3, size=64)
    with studio_here(tmp_path, annotator="ada") as running:
        page = entered(browser, running)
        page.get_by_role("button", name="pairs", exact=True).click()
        page.get_by_role("button", name="Begin").click()
        page.locator(".stage img").first.wait_for()
        assert page.locator("#count").inner_text() == "0 of 3"
        assert not page.wrong


def test_a_label_that_cannot_be_written_is_not_counted(browser: Any, tmp_path: Path) -> None:
    scored_table(tmp_path / "pairs", 4, size=64)
    with studio(tmp_path, "--source", str(tmp_path / "pairs"), "--annotator", "ada") as running:
        page = entered(browser, running)
        page.locator(".stage img").first.wait_for()
        judge(page, "ArrowLeft")
        import resource

        size = (tmp_path / "labels" / "ada.jsonl").stat().st_size + 30
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        before = page.locator("body").get_attribute("data-visit")
        page.keyboard.press("ArrowLeft")
        page.locator("#banner", has_text="cannot be written").wait_for()
        assert page.locator("body").get_attribute("data-visit") == before
        assert page.locator("#count").inner_text().startswith("1 of ")
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        judge(page, "ArrowLeft")
        assert page.locator("#banner").is_hidden()
    rows = (tmp_path / "labels" / "ada.jsonl").read_text().splitlines()
    assert len([row for row in rows if json.loads(row)["event"] == "verdict"]) == 2


def test_markup_in_a_prompt_is_text(browser: Any, tmp_path: Path) -> None:
    folders = picture_folders(tmp_path, ("a", "b"), 1)
    for folder in folders:
        (folder / "0.txt").write_text("<img src=x onerror=document.title=1> a star")
    with studio_here(tmp_path, source=tuple(map(str, folders))) as running:
        page = entered(browser, running)
        page.locator(".prompt", has_text="<img src=x onerror").wait_for()
        assert re.match("Label", page.title())
        assert not page.wrong
