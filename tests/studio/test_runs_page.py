"""The Runs page: runs as they grow, damaged and shrinking metrics, alarms, and two runs beside each other."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion_align.evaluation.report import Report
from diffusion_align.studio.serving.run_desk import MetricTail, curves
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.settings import save_config
from tests.studio.serving import Studio, studio_here
from tests.studio.test_label_page import entered

pytestmark = pytest.mark.slow


def a_run(folder: Path, steps: int = 40, **settings: Any) -> Path:
    """What a run of DPO leaves while it trains."""
    (folder / "samples").mkdir(parents=True)
    save_config(DPOConfig(output_dir=str(folder), max_steps=100, **settings), folder / "config.yaml")
    lines = [{"step": step, "loss": 0.69 - step / 1000, "grad_norm": 1.0} for step in range(0, steps, 2)]
    lines += [{"step": steps, "eval/win_rate": 0.6125, "alarm/artefacts": 0.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (20, 40):
        Image.new("RGB", (96, 48), (step * 4, 80, 90)).save(folder / "samples" / f"step-{step:06d}.png")
    (folder / "checkpoint-20").mkdir()
    return folder


def test_metrics_are_read_on_and_anew_when_the_file_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    tail = MetricTail(path)
    assert tail.update()
    assert [row["step"] for row in tail.rows] == [1]
    with path.open("a") as file:
        file.write('ss": 1.5}\nnonsense\n{"step": 3, "loss": NaN}\n')
    assert tail.update()
    assert not tail.update()
    assert curves(tail.rows) == {"loss": [[1, 2.0], [2, 1.5]]}
    assert tail.damaged == 1
    path.write_text('{"step": 1, "loss": 2.0}\n')  # a run that is resumed drops later lines
    assert tail.update()
    assert [row["step"] for row in tail.rows] == [1]


def the_report_is_shown_and_can_do_nothing(page: Any, running: Studio, folder: Path, root: Path) -> None:
    run = running.ask("runs-list")["runs"][0]["id"]
    assert running.get(f"/report/{run}").status == 404
    (root.parent / "elsewhere.html").write_text("secret")
    (folder / "report.html").symlink_to(root.parent / "elsewhere.html")
    other = running.get(f"/report/{run}")
    assert (other.status, b"secret" in other.body) == (404, False)
    (folder / "report.html").unlink()
    picture = Image.new("RGB", (40, 30), (20, 120, 40))
    Report("How it went").text("Well.").image(picture, "a picture").write(folder)
    harm = "<script>parent.document.title = document.title = 'harmed'</script></body>"
    (folder / "report.html").write_text((folder / "report.html").read_text().replace("</body>", harm))
    page.reload()
    page.locator("#report").click()
    frame = page.frame_locator("dialog iframe")
    frame.get_by_role("heading", name="How it went").wait_for()
    assert frame.locator("img").evaluate("image => image.complete && image.naturalWidth") == 40
    assert page.title().startswith("Runs")
    page.keyboard.press("Escape")
    answer = running.get(f"/report/{run}")
    assert answer.status == 200
    assert {"sandbox", "default-src 'none'"} <= set(answer.headers["content-security-policy"].split("; "))
    for name in ("no-such-run", f"{run}/../{run}", "..%2f..%2fconfig.yaml"):
        assert running.get(f"/report/{name}").status == 404


def test_a_run_is_shown_and_follows_its_metrics(browser: Any, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "runs" / "dpo")
    with studio_here(tmp_path) as running:
        page = entered(browser, running, "/runs")
        page.locator("#run h2", has_text="runs/dpo").wait_for()
        page.locator(".dot.running").wait_for()
        assert page.locator("#run p").first.inner_text().startswith("running · dpo · 40 of 100 steps")
        page.locator("[data-metric='loss'] text", has_text="log 2").wait_for()
        assert page.locator(".strip img").count() == 2
        with (folder / "metrics.jsonl").open("a") as file:
            monitored = {"artefact/saturation": 0.7, "alarm/picture_saturation": 1.0, "alarm/picture_dark": 0.0}
            file.write(json.dumps({"step": 50, "loss": 0.5, "alarm/artefacts": 1.0, **monitored}) + "\n")
        page.locator(".alarm", has_text="artefact saturation, since step 50").wait_for()
        assert page.locator(".alarm").count() == 1
        page.locator("#run", has_text="Checkpoints: 20").wait_for()
        page.locator("#run p", has_text="50 of 100 steps").wait_for()
        the_report_is_shown_and_can_do_nothing(page, running, folder, tmp_path)
        assert not page.wrong
        old = time.time() - 3600
        os.utime(folder / "metrics.jsonl", (old, old))
        assert not running.ask("runs-list")["runs"][0]["running"]


def test_two_runs_differ_in_what_is_no_default_only(browser: Any, tmp_path: Path) -> None:
    a_run(tmp_path / "one", beta=500.0)
    a_run(tmp_path / "two", seed=3)
    text = (tmp_path / "two" / "config.yaml").read_text()
    shorter = "\n".join(line for line in text.splitlines() if not line.startswith(("warmup_steps", "adam_beta1")))
    (tmp_path / "two" / "config.yaml").write_text(shorter)  # as an older version wrote it
    with studio_here(tmp_path) as running:
        runs = {run["name"]: run["id"] for run in running.ask("runs-list")["runs"]}
        found = running.ask("runs-compare", run=runs["one"], other=runs["two"])
        names = {one["name"]: one["values"] for one in found["differences"]}
        assert set(names) == {"beta", "seed", "output_dir"}
        assert names["seed"] == ["0", "3"]
        assert [one["step"] for one in found["samples"]] == [20, 40]
        page = entered(browser, running, "/runs")
        page.locator("[data-run='one']").click()
        page.get_by_label("Beside").select_option("two")
        page.get_by_role("cell", name="beta", exact=True).first.wait_for()
        assert page.locator("[data-metric='loss'] polyline").count() == 2
        assert not page.wrong
