"""The Compare page and its drawing process, on a small random model."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusion_align.adapters import load_adapter
from diffusion_align.cli import main
from diffusion_align.data import Comparisons
from diffusion_align.studio.drawing.orders import Ended, Order, Told
from diffusion_align.studio.drawing.studio_artist import StudioArtist
from tests.studio.serving import Studio, studio_here
from tests.studio.test_label_page import entered, judge

pytestmark = pytest.mark.slow
PROMPT = "a small red star <img src=x onerror=document.title=1>"


@pytest.fixture(scope="module")
def home(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA that changes pictures."""
    folder = tmp_path_factory.mktemp("home")
    adapter = load_adapter(str(sdxl_folder))
    adapter.train_lora(rank=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.trainable_parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapter.save(folder / "lora")
    return folder


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Studio]:
    with studio_here(home) as found:
        yield found


def ask_board(running: Studio, sdxl_folder: Path, **changes: Any) -> dict[str, Any]:
    given = {"columns": ["base", "tuned=lora"], "prompts": [PROMPT], "seed": 3, "count": 2, "steps": 2,
             "model": str(sdxl_folder)}  # fmt: skip
    return dict(running.ask("compare-start", **given | changes))


def waited(running: Studio, state: str = "done", seconds: float = 120) -> dict[str, Any]:
    """The page's state when the job is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = running.ask("compare-state")
        if found["job"]["state"] != "running":
            assert found["job"]["state"] == state, found["job"]
            return dict(found)
        time.sleep(0.05)
    raise AssertionError(f"no end after {seconds} s: {found['job']}")


def pixels(running: Studio, state: dict[str, Any], key: str) -> np.ndarray[Any, Any]:
    import io

    answer = running.get(f"/picture/{state['board']['cells'][key]['picture']}")
    assert answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.body)))


def test_pictures_are_those_of_the_copied_command_and_the_slider_has_base_and_lora_at_its_ends(
    running: Studio, home: Path, sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_board(running, sdxl_folder)
    state = waited(running)
    monkeypatch.chdir(home)
    for column in (0, 1):
        command = shlex.split(state["board"]["commands"][str(column)])[1:]
        assert main([*command, "--out", str(tmp_path / str(column))]) == 0
        files = sorted((tmp_path / str(column)).glob("*.png"))
        assert len(files) == 2
        for row, file in enumerate(files):
            assert np.array_equal(np.asarray(Image.open(file)), pixels(running, state, f"{column}/{row}/1"))
    assert not np.array_equal(pixels(running, state, "0/0/1"), pixels(running, state, "1/0/1"))
    for strength in (0, 1.5):
        running.ask("compare-strength", column=1, strength=strength)
        state = waited(running)
    assert np.array_equal(pixels(running, state, "1/0/0"), pixels(running, state, "0/0/1"))
    assert not np.array_equal(pixels(running, state, "1/0/1.5"), pixels(running, state, "1/0/1"))
    before = running.ask("compare-state")["job"]["number"]
    assert running.ask("compare-strength", column=1, strength=1)["job"]["number"] == before  # it is there
    assert running.post("compare-strength", column=0, strength=0.5).status == 400
    grid = running.ask("compare-grid")["file"]
    assert Image.open(home / grid).width > 200
    name = running.ask("compare-label", name="from-compare")["name"]
    assert len(running.ask("label-next", task=name, annotator="ada")["visits"]) == 2
    assert "record" in running.ask("label-summary", task=name)["rule"]


def test_cancel_frees_the_process_within_a_step(running: Studio, sdxl_folder: Path) -> None:
    """The process is stopped while it is told to, so that what it had said before is known."""
    ask_board(running, sdxl_folder, columns=["base"], steps=400, count=1)
    while running.ask("compare-state")["job"]["step"] < 2:
        time.sleep(0.02)
    process = drawing_process()
    process.suspend()
    time.sleep(0.3)
    before = running.ask("compare-state")["job"]["step"]
    running.ask("compare-cancel")
    process.resume()
    assert 0 <= waited(running, "cancelled", 60)["job"]["step"] - before <= 1
    ask_board(running, sdxl_folder, columns=["base"], count=1)
    assert waited(running)["job"]["done"] == 1
    assert drawing_process() == process


def drawing_process() -> psutil.Process:
    """The one of this test's studio."""
    (server,) = [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]
    (found,) = server.children()
    return found


def test_an_idle_process_ends_and_gives_its_memory_back(home: Path, sdxl_folder: Path) -> None:
    told: list[Told] = []
    artist = StudioArtist(home, 1.0, told.append)
    artist.order(Order(1, str(home / "idle"), {0: "base"}, {}, ("a star",), (0,), (), 1, 5.0, str(sdxl_folder)))
    process = psutil.Process(artist.pid)
    end = time.monotonic() + 120
    while artist.pid is not None and time.monotonic() < end:
        time.sleep(0.1)
    assert not process.is_running()
    assert told[-1] == Ended(1)  # and nothing is told of the end


def test_bad_sides_are_refused_or_named(running: Studio, sdxl_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    start = {"prompts": ["a star"], "model": str(sdxl_folder)}
    assert running.post("compare-start", columns=[str(tmp_path / "x.safetensors")], **start).status == 404
    assert running.post("compare-start", columns=["base@nothing"], **start).status == 400
    assert running.post("compare-start", columns=["base"] * 7, **start).status == 400
    assert running.post("compare-start", columns=["base"], prompts=[]).status == 400
    ask_board(running, sdxl_folder, columns=["base@guidence=dynamic"])
    assert "guidence" in waited(running, "failed")["job"]["error"]


def test_the_page_draws_shows_progress_again_after_a_reload_and_text_as_text(
    browser: Any, running: Studio, sdxl_folder: Path
) -> None:
    page = entered(browser, running, "/compare", viewport={"width": 1280, "height": 800})
    page.get_by_label("Prompts").fill(PROMPT)
    page.get_by_label("Steps").fill("24")
    page.get_by_text("Base model and scorers").click()
    page.get_by_label("Base model", exact=True).fill(str(sdxl_folder))
    columns = page.get_by_label("Column", exact=True)
    while columns.count() < 2:
        page.get_by_role("button", name="Add a column").click()
    columns.nth(0).fill("base")
    columns.nth(1).fill("tuned=lora")
    page.locator("#draw").click()
    page.locator("#job", has_text=re.compile(r"step \d+ of 24")).wait_for(timeout=120_000)
    page.reload()
    page.locator("#job", has_text=re.compile(r"of 4 pictures")).wait_for()
    drawing_process().kill()
    page.locator("#failed", has_text="The drawing process ended (killed by signal 9)").wait_for()
    page.locator("#draw").click()
    page.locator("#board img").nth(3).wait_for(timeout=120_000)
    assert page.locator("#board p").first.inner_text() == PROMPT
    assert page.title().startswith("Compare")
    slider = page.get_by_label("Strength of tuned")
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    page.locator("[data-cell='1/1'][data-strength='0'] img").wait_for(timeout=120_000)
    page.locator("[data-cell='1/0'] .frame").click()
    page.locator("dialog.zoom .pane").nth(1).wait_for()
    page.keyboard.press("Escape")
    assert not page.wrong


def test_fresh_pictures_are_drawn_for_label_and_exported_with_model_and_scale(
    browser: Any, running: Studio, home: Path, sdxl_folder: Path
) -> None:
    asked = {"columns": ["base", "lora"], "prompts": ["a star"], "count": 1, "steps": 2, "model": str(sdxl_folder)}
    for wrong, status in (
        ({"columns": ["base"]}, "one picture of a prompt"),
        ({"kind": "best-worst"}, "expected 3 or more"),
        ({"columns": ["base"], "count": 3}, "expected two pictures"),
        ({"order": "active"}, "needs scores"),
        ({"holdout": 0.1}, "expected at least 50"),
        ({"count": 5000}, "expected 1 to 4096"),
        ({"name": "from/here"}, "expected letters"),
        ({"surprise": 1}, "unknown setting"),
    ):
        answer = running.post("fresh-start", **{**asked, **wrong})
        assert (answer.status, status in answer.json()["error"]) == (400, True), answer.body
    assert running.post("fresh-start", **{**asked, "columns": ["/etc", "base"]}).status == 404
    page = entered(browser, running)
    page.get_by_label("From").select_option("fresh")
    prompts = [f"a star and {number} rings" for number in range(2)]
    page.get_by_label("Text file").set_input_files(
        {"name": "prompts.txt", "mimeType": "text/plain", "buffer": "\n".join(prompts).encode()}
    )
    page.get_by_label("Models, one a line").fill("low=base@guidance_scale=2\nhigh=lora@guidance_scale=8")
    page.get_by_label("Base model").fill(str(sdxl_folder))
    page.get_by_label("Steps").fill("24")
    page.get_by_label("Folder of labels").fill("fresh")
    page.locator("#begin").click()
    page.locator("#job", has_text="of 4 pictures").wait_for(timeout=120_000)
    process = drawing_process()
    process.suspend()  # so that it is still drawing when the page is loaded again
    page.reload()
    page.locator("#job", has_text="of 4 pictures").wait_for()
    process.resume()
    page.locator(".stage img").nth(1).wait_for(timeout=120_000)
    for _ in prompts:
        judge(page, "ArrowLeft")
    assert not page.wrong
    running.ask("label-export", task="fresh")
    rows = pq.read_table(home / "fresh-pairs").to_pylist()
    assert {row["caption"] for row in rows} == set(prompts)
    for row in rows:
        scales, models = [row["scale_0"], row["scale_1"]], [row["model_0"], row["model_1"]]
        assert sorted(scales) == [2.0, 8.0]
        assert models[scales.index(2.0)] == str(sdxl_folder)
        assert models[scales.index(8.0)].endswith("+ lora")
    # What the evaluator of kind value learns from.
    assert {"scale_0", "scale_1"} <= set(Comparisons(home / "fresh-pairs").source.columns)
    assert sorted(Comparisons(home / "fresh-pairs")[0].scales) == [2.0, 8.0]
