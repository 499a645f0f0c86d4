"""Nothing on a page is cut off or lies over something else, at both widths and in both themes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.studio.make_screenshots import IMAGES, SIZES, hanging_out, label_folder, shown
from tests.studio.material import scored_table
from tests.studio.serving import Studio, studio_here
from tests.studio.test_runs_page import a_run

pytestmark = pytest.mark.slow
#: Pages and what is there when they are drawn.
PAGES = {"label": ".stage img", "compare": "#draw", "runs": "#run svg", "data": ".tile img"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    home = tmp_path_factory.mktemp("home")
    a_run(home / "runs" / "a-run-with-a-name-that-is-rather-long")
    label_folder(home)
    scored_table(home / "scored", 4)
    options: dict[str, Any] = {"annotator": "somebody-with-a-long-name", "words": True, "aspects": ("composition",)}
    with studio_here(home, source=(str(home / "pairs"),), **options) as found:
        yield found


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_off_or_overlaps(browser: Any, running: Studio, name: str, width: int, theme: str) -> None:
    with shown(browser, running, f"/{name}", width, theme) as page:
        page.locator(PAGES[name]).first.wait_for()
        page.wait_for_timeout(150)
        assert hanging_out(page) == []
        if name == "label":
            the_dialogs_and_the_form_fit(page)
        paper = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        assert (sum(int(part) for part in paper[4:-1].split(",")) > 380) == (theme == "light")


def the_dialogs_and_the_form_fit(page: Any) -> None:
    """Help, summary, and what begins another folder of labels."""
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keys").wait_for()
    assert hanging_out(page) == []
    page.keyboard.press("Escape")
    page.locator("#session").click()
    page.locator("#export").wait_for()
    assert hanging_out(page) == []
    page.locator("#another").click()
    for source in ("there", "fresh"):
        page.get_by_label("From").select_option(source)
        assert hanging_out(page) == []


@pytest.mark.parametrize("name", ["studio-label.png", "studio-compare.png"])
def test_the_readme_shows_both_pages(name: str) -> None:
    """``python -m tests.studio.make_screenshots`` makes them."""
    assert Image.open(IMAGES / name).width == 1280
    assert name in (Path(__file__).parents[2] / "README.md").read_text()
