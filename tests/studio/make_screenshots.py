"""Pictures of the studio for README and docs: ``python -m tests.studio.make_screenshots [FOLDER]``.

Label shows pairs that come with the package; Compare draws with ``scenes-sdxl`` with and without its shipped LoRA.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from diffusion_align.shipped import shipped_path
from tests.studio.browser import opened_browser
from tests.studio.serving import Studio, studio_here

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SIZES = {1280: 800, 390: 844}
PROMPTS = ("a large red star left of a small blue ring on a dark background",)
COLUMNS = ("base", "dynamic=base@guidance=dynamic", "scenes-aligned")


@contextmanager
def shown(browser: Any, running: Studio, path: str, width: int, theme: str) -> Iterator[Any]:
    """A page of the studio at a width and in a theme."""
    context = browser.new_context(viewport={"width": width, "height": SIZES[width]}, color_scheme=theme)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(running.address)
    page.goto(running.origin + path)
    yield page
    context.close()


def hanging_out(page: Any) -> list[str]:
    """Texts and controls that are cut off at the right, or lie over each other; of an open dialog only its own."""
    found: list[str] = page.locator("body").evaluate(
        """body => {
          const wrong = [];
          if (document.documentElement.scrollWidth > innerWidth) wrong.push("the page is wider than the window");
          const shown = body.querySelector("dialog[open]") ?? body;
          const boxes = [...shown.querySelectorAll("button, select, input, textarea, nav a, h1, h2, .prompt")]
            .filter(one => one.offsetParent && !one.closest("details:not([open]), .board, .strip, datalist, .scroll"))
            .map(one => [one, one.getBoundingClientRect()]).filter(([, box]) => box.width && box.height);
          for (const [one, box] of boxes) {
            if (box.right > innerWidth + 1 || box.left < -1) wrong.push(`cut off: ${one.outerHTML.slice(0, 80)}`);
            for (const [other, there] of boxes) {
              if (one === other || one.contains(other) || other.contains(one)) continue;
              const x = Math.min(box.right, there.right) - Math.max(box.left, there.left);
              const y = Math.min(box.bottom, there.bottom) - Math.max(box.top, there.top);
              if (x > 1 && y > 1) {
                wrong.push(`overlapping: ${one.outerHTML.slice(0, 60)} and ${other.outerHTML.slice(0, 60)}`);
              }
            }
          }
          return wrong;
        }"""
    )
    return found


def label_folder(home: Path, pairs: int = 24) -> Path:
    """A folder with some of the shipped pairs."""
    (home / "pairs").mkdir(parents=True)
    (source,) = shipped_path("scenes-pairs").glob("train-*.parquet")
    pq.write_table(pq.read_table(source).slice(0, pairs), home / "pairs" / "train-00000-of-00001.parquet")
    return home / "pairs"


def draw_board(page: Any, columns: Sequence[str], prompts: Sequence[str], count: int = 2, steps: int = 25) -> None:
    """Fill in the Compare page and wait for all pictures."""
    page.get_by_label("Prompts").fill("\n".join(prompts))
    page.get_by_label("Steps").fill(str(steps))
    page.get_by_label("Pictures of each prompt").fill(str(count))
    lines = page.get_by_label("Column", exact=True)
    while lines.count() < len(columns):
        page.get_by_role("button", name="Add a column").click()
    for number, text in enumerate(columns):
        lines.nth(number).fill(text)
    page.locator("#draw").click()
    page.locator("#board img").nth(len(columns) * len(prompts) * count - 1).wait_for(timeout=300_000)
    page.locator("#save-grid:enabled").wait_for()


def shoot_board(page: Any, file: Path) -> None:
    """The whole board with its buttons, as wide as the page, and nothing else."""
    page.locator("#board").evaluate("board => window.scrollTo(0, 0)")
    box = page.locator("#board").bounding_box()
    whole = {"x": 0, "y": box["y"] - 12, "width": page.viewport_size["width"], "height": box["height"] + 36}
    page.screenshot(path=file, full_page=True, clip=whole)


def main(arguments: Sequence[str]) -> int:
    """Make both pictures."""
    out = Path(arguments[0]) if arguments else IMAGES
    out.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp())
    try:
        source = label_folder(home)
        with (
            opened_browser() as browser,
            studio_here(home, source=(str(source),), annotator="ada", seed=1) as running,
        ):
            for number, visit in enumerate(running.ask("label-next")["visits"][:3]):
                running.ask("label-verdict", visit=visit["id"], choice=("left", "right", "tie")[number], ms=900)
            with shown(browser, running, "/label", 1280, "light") as page:
                page.locator(".stage img").nth(1).wait_for()
                page.wait_for_timeout(500)
                page.screenshot(path=out / "studio-label.png")
            with shown(browser, running, "/compare", 1280, "light") as page:
                draw_board(page, COLUMNS, PROMPTS, count=1)
                page.wait_for_timeout(500)
                shoot_board(page, out / "studio-compare.png")
    finally:
        shutil.rmtree(home)
    for name in ("studio-label.png", "studio-compare.png"):
        Image.open(out / name).convert("P", palette=Image.Palette.ADAPTIVE, colors=255).save(out / name, optimize=True)
        print(out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
