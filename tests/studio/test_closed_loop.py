"""From pictures over labels in the browser to a model that does what was liked, with the commands that a user has."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_align import generate, load_adapter, win_rate
from diffusion_align.cli import main
from diffusion_align.scenes.world.grammar import sample_prompt
from tests.studio.make_screenshots import draw_board
from tests.studio.serving import Studio, studio_here
from tests.studio.test_label_page import entered, judge

pytestmark = pytest.mark.slow


def background(pixels: np.ndarray[Any, Any]) -> float:
    """Brightness at the border of a picture (H, W, 3), in [0, 1]."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).astype(float)
    return float(edge.mean()) / (255 if edge.max() > 1 else 1)


def brighter(page: Any, running: Studio) -> str:
    """The key of the picture with the brighter background, of those that the browser shows."""
    sources = [page.locator(".stage img").nth(side).get_attribute("src") for side in (0, 1)]
    levels = [background(np.asarray(Image.open(io.BytesIO(running.get(str(source)).body)))) for source in sources]
    return "ArrowLeft" if levels[0] > levels[1] else "ArrowRight"


def test_a_model_learns_what_was_chosen_in_the_browser(browser: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    # Without a word on the background, so that the rule and the prompt do not fight.
    prompts = list(dict.fromkeys(sample_prompt(rng).text().partition(" on a ")[0] for _ in range(200)))[:60]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[:40]))
    drawn = ["--out", str(tmp_path / "drawn"), "--per-prompt", "2", "--num-inference-steps", "6", "--batch-size", "16"]
    assert main(["annotate", str(tmp_path / "prompts.txt"), "--scorers", "scenes-clip", *drawn]) == 0
    with studio_here(tmp_path, source=(str(tmp_path / "drawn"),), annotator="ada") as running:
        page = entered(browser, running)
        for _ in range(60):  # 40 pairs, and those that come back with their sides exchanged
            page.locator(".stage img").nth(1).wait_for()
            judge(page, brighter(page, running))
            if page.locator(".finished").count():
                break
        page.get_by_role("button", name="Summary and export").click()
        page.locator("#export").click()
        page.locator("#exported", has_text="pairs in train").wait_for()
        recipe = ["--config", "scenes_dpo", "--dataset", str(tmp_path / "labels-pairs"), "--max-steps", "60"]
        quick = ["--per-device-train-batch-size", "3", "--final-pictures", "0"]
        quick += ["--report-to", "none", "--no-progress"]
        assert main(["train", "dpo", *recipe, *quick, "--output-dir", str(tmp_path / "runs" / "bright")]) == 0
        page.goto(f"{running.origin}/runs")
        page.locator("#run p", has_text="60 of 60 steps").wait_for()
        page.goto(f"{running.origin}/compare")
        draw_board(page, ("base", "runs/bright"), prompts[40:41], count=1, steps=8)
        assert page.locator("#board img").count() == 2
        assert not page.wrong
    adapter = load_adapter("scenes-sdxl").load_weights(str(tmp_path / "runs" / "bright"))
    unseen = prompts[40:]
    drawing: dict[str, Any] = {"seeds": list(range(len(unseen))), "num_inference_steps": 8}
    with adapter.reference():
        before = generate(adapter, unseen, **drawing)
    after = generate(adapter, unseen, **drawing)
    levels = [[background(image.permute(1, 2, 0).numpy()) for image in images] for images in (after, before)]
    assert win_rate(levels[0], levels[1]).interval[0] > 0.5, str(win_rate(levels[0], levels[1]))
