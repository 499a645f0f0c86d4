"""Win rates against scipy, and reports that stand alone."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diffusion_align.evaluation import (
    Report,
    clustered_win_rate,
    curve_figure,
    image_grid,
    paired_difference,
    win_rate,
    win_rate_bars,
)
from diffusion_align.evaluation.line_chart import line_chart
from diffusion_align.evaluation.report import favourite


def test_the_interval_is_wilson_s() -> None:
    a = np.array([1.0] * 140 + [0.0] * 60)
    found = win_rate(a, 1 - a)
    expected = stats.binomtest(140, 200).proportion_ci(method="wilson")
    assert (found.wins, found.losses, found.rate) == (140, 60, 0.7)
    assert found.interval == pytest.approx((expected.low, expected.high))


def test_ties_count_half() -> None:
    found = win_rate([1.0, 0.5, 0.0, 0.52], [0.0, 0.5, 1.0, 0.5], tie_margin=0.05)
    assert (found.wins, found.losses, found.ties, found.rate) == (1, 1, 2, 0.5)


def test_the_interval_covers_the_truth_at_its_rate() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        wins = (rng.random(100) < 0.65).astype(float)
        low, high = win_rate(wins, 1 - wins).interval
        hits += low <= 0.65 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_several_seeds_on_the_same_prompts_are_not_independent() -> None:
    rng = np.random.default_rng(1)
    one = rng.normal(0.3, 1, 200)
    single, tripled = (clustered_win_rate([one] * n).interval for n in (1, 3))
    assert tripled[1] - tripled[0] == pytest.approx(single[1] - single[0], rel=0.05)


def test_the_paired_difference_is_the_t_interval() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.2, 1, 50), rng.normal(0, 1, 50)
    found = paired_difference(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval()
    assert found.interval == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([float("nan")], [1.0])])
def test_scores_that_cannot_be_compared_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="score"):
        win_rate(a, b)


class Page(HTMLParser):
    """Collects what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_report_is_one_file_with_its_pictures_inside(tmp_path: Path) -> None:
    picture = image_grid([[np.full((8, 8, 3), 200, np.uint8)] * 2], ["row"], ["left", "right"])
    report = Report("A <b>title</b>").text("## Results\n\n**bold** and `code`").table([{"name": "x", "value": 0.5}])
    report.facts({"seed": 1}).image(picture, "before & after")
    report.figure(curve_figure({"loss": [(0, 1.0), (1, 0.5)]}, "Loss", "loss"), "the loss")
    report.figure(win_rate_bars({"dpo": win_rate([1.0, 1.0, 0.0], [0.0, 0.0, 1.0])}), "win rates")
    path = report.write(tmp_path)
    html = path.read_text()
    page = Page()
    page.feed(html)
    assert "script" not in page.tags
    assert len(page.sources) == 3
    for source in page.sources:
        assert source.startswith("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert "A &lt;b&gt;title&lt;/b&gt;" in html
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_pictures_stand_over_their_names_and_the_best_is_marked(tmp_path: Path) -> None:
    rows = [[np.full((8, 8, 3), shade, np.uint8) for shade in (10, 200)] for _ in range(2)]
    report = Report("pictures").pictures(rows, ["a <b>", "c"], ["base", "tuned"], "which is better", [1, None])
    report.table([{"side": "tuned", "wins": 3}], {(0, "side"), (0, "wins")})
    html = report.write(tmp_path).read_text()
    assert html.count('<div class="cell">') == 3
    assert re.findall(r'<div class="cell best"><img [^>]*alt="([^"]*)">([^<]*)', html) == [
        ("a &lt;b&gt;, tuned", "★ tuned")
    ]
    assert '<td class="best">★ tuned</td><td class="number best">★ 3</td>' in html
    (sheet,) = tmp_path.glob("*.png")
    assert (0, 158, 115) in Image.open(sheet).convert("RGB").getdata()
    with pytest.raises(ValueError, match="at least one row"):
        Report("none").pictures([], [], ["base"], "nothing")
    assert [favourite([1.0, 2.0]), favourite([2.0, 2.0])] == [1, None]


def test_a_chart_shows_every_finite_point_where_it_belongs() -> None:
    points = {"one": [(2, 3.0), (0, 1.0), (1, float("nan")), (3, 2.0)], "a < b": [(0, 2.0)]}
    svg = ElementTree.fromstring(line_chart(points))
    first, second = svg.findall("path")
    # The lowest value is at the bottom left, the highest at the top, and the gap stays open; what is alone is a dot.
    assert first.attrib["d"] == "M62.0,210.0h0M319.3,12.0L448.0,111.0"
    assert second.attrib["d"] == "M62.0,111.0h0"
    assert [path.findtext("title") for path in (first, second)] == ["one", "a < b"]
    labels = [text.text for text in svg.findall("text")]
    assert labels == ["1", "1.5", "2", "2.5", "3", "0", "1", "2", "3", "step"]


@pytest.mark.parametrize("value", [0.0, -7.5, 1e-12])
def test_a_value_that_never_changes_is_a_line_in_the_middle(value: float) -> None:
    svg = ElementTree.fromstring(line_chart({"same": [(5, value), (6, value)]}, smooth=2))
    raw, mean = svg.findall("path")
    assert raw.attrib["d"] == mean.attrib["d"] == "M62.0,111.0L448.0,111.0"


def test_no_points_are_named() -> None:
    with pytest.raises(ValueError, match="'loss': expected"):
        line_chart({"loss": []})
    with pytest.raises(ValueError, match="at least one named series"):
        Report("t").chart({}, "nothing")


def test_a_ragged_table_or_grid_is_named() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\]"):
        Report("t").table([{"a": 1}, {"b": 2}])
    with pytest.raises(ValueError, match=r"rows\[0\]: expected 2 pictures"):
        image_grid([[np.zeros((4, 4, 3), np.uint8)]], ["row"], ["a", "b"])
