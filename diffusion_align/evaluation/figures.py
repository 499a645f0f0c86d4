"""Picture grids and charts for reports; nothing here opens a window or touches matplotlib's global state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .stats import WinRate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#1f2328", "#656d76", "#d8dee4", "#ffffff"
# Okabe and Ito's colours: told apart with every common form of colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: Frames the best of several pictures.
BEST = COLOURS[2]
#: Of pictures in a report, at most, in pixels; small ones are enlarged.
SHOWN_SIDE = 192
_GAP, _MARGIN, _LABEL_WIDTH, _FONT_SIZE = 8, 16, 176, 15


def image_grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    upscale: int = 3,
    resample: Literal["lanczos", "nearest"] = "lanczos",
    best: Collection[tuple[int, int]] = frozenset(),
) -> Image.Image:
    """Pictures in a labelled grid on white; labels are wrapped, never cut.

    ``rows[r][c]`` is a uint8 (height, width, 3) picture, all of one shape; each is enlarged ``upscale`` times.
    ``row_labels`` stand to the left of their row, ``column_labels`` above their column; "" leaves a label out, and
    the label column disappears when every row label is "". Pictures in ``best``, by row and column, are framed.
    Returns an RGB picture.

    Raises ``ValueError`` naming the row and column for a ragged grid, a picture of another shape or dtype, or the wrong
    number of labels.
    """
    height, width = _check_grid(rows, row_labels, column_labels, upscale)
    cell_width, cell_height = width * upscale, height * upscale
    regular, bold = _font("DejaVuSans.ttf"), _font("DejaVuSans-Bold.ttf")
    left = _MARGIN + (_LABEL_WIDTH + _GAP if any(row_labels) else 0)
    line = sum(regular.getmetrics()) + 2
    headers = [_wrap(text, bold, cell_width) for text in column_labels]
    captions = [_wrap(text, regular, _LABEL_WIDTH) for text in row_labels]
    header_height = max(len(lines) for lines in headers) * line
    heights = [max(cell_height, len(lines) * line) for lines in captions]
    top = _MARGIN + (header_height + _GAP if header_height else 0)
    canvas = Image.new(
        "RGB",
        (
            left + len(headers) * (cell_width + _GAP) - _GAP + _MARGIN,
            top + sum(heights) + _GAP * (len(heights) - 1) + _MARGIN,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(headers):
        x = left + column * (cell_width + _GAP) + cell_width // 2
        for index, text in enumerate(lines):
            # Short headers sit on the pictures, not at the top of the tallest header.
            y = _MARGIN + header_height - (len(lines) - index) * line
            draw.text((x, y), text, fill=INK, font=bold, anchor="ma")
    method = Image.Resampling.NEAREST if resample == "nearest" else Image.Resampling.LANCZOS
    y = top
    for row, (pictures, lines, row_height) in enumerate(zip(rows, captions, heights, strict=True)):
        for index, text in enumerate(lines):
            text_y = y + (row_height - len(lines) * line) // 2 + index * line
            draw.text((_MARGIN, text_y), text, fill=INK, font=regular)
        for column, pixels in enumerate(pictures):
            picture = Image.fromarray(np.ascontiguousarray(pixels)).resize((cell_width, cell_height), method)
            x, picture_y = left + column * (cell_width + _GAP), y + (row_height - cell_height) // 2
            canvas.paste(picture, (x, picture_y))
            if (row, column) in best:
                frame = (x - 3, picture_y - 3, x + cell_width + 2, picture_y + cell_height + 2)
                draw.rectangle(frame, outline=BEST, width=3)
        y += row_height + _GAP
    return canvas


def reduced(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture (H, W, 3), averaged down until no side is longer than ``SHOWN_SIDE``."""
    factor = max(1, -(-max(pixels.shape[:2]) // SHOWN_SIDE))
    return np.asarray(Image.fromarray(pixels).reduce(factor))


def curve_figure(
    series: Mapping[str, Sequence[tuple[float, float]]], title: str, ylabel: str, smooth: int = 1, xlabel: str = "step"
) -> Figure:
    """One line per series of (step, value) points, steps in any order; ``xlabel`` says what the steps are.

    ``smooth`` is the width in points of a centred running mean; the raw points stay visible behind it. Non-finite
    values leave a gap in the line. Raises ``ValueError`` for no series, an empty series, a point that is not a
    (finite step, value) pair, or ``smooth`` < 1.
    """
    if not series:
        raise ValueError("series: expected at least one named series, got none")
    if smooth < 1:
        raise ValueError(f"smooth: expected a window of at least 1 point, got {smooth}")
    figure, axes = _chart((7.2, 3.8), title)
    for index, (name, points) in enumerate(series.items()):
        steps, values = ordered_points(name, points)
        colour = COLOURS[index % len(COLOURS)]
        # A lone point would be invisible as a line.
        marker = "o" if len(steps) == 1 else ""
        if smooth > 1:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1.0)
        dash = "-" if index < len(COLOURS) else "--"
        axes.plot(steps, running_mean(values, smooth), dash, color=colour, linewidth=1.8, marker=marker, label=name)
    axes.set_xlabel(xlabel, color=MUTED)
    axes.set_ylabel(ylabel, color=MUTED)
    axes.margins(x=0.01)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    return figure


def win_rate_bars(rates: Mapping[str, WinRate], title: str = "Win rate over the base model") -> Figure:
    """One horizontal bar per named win rate with its interval as whiskers and a line at 50% (no preference).

    Raises ``ValueError`` when ``rates`` is empty.
    """
    if not rates:
        raise ValueError("rates: expected at least one named win rate, got none")
    names = [textwrap.fill(name, 28) for name in rates]
    lines = sum(max(1, name.count("\n") + 1) for name in names)
    figure, axes = _chart((7.2, 1.3 + 0.3 * len(names) + 0.18 * lines), title)
    for position, rate in enumerate(rates.values()):
        low, high = rate.interval
        # Grey where the interval holds 50%: such a bar is no evidence of a preference.
        colour = MUTED if low <= 0.5 <= high else COLOURS[0] if rate.rate > 0.5 else COLOURS[1]
        axes.barh(position, rate.rate, height=0.56, color=colour, alpha=0.85)
        axes.errorbar(
            rate.rate,
            position,
            # A percentile interval can, in rare cases, leave its own estimate outside; whiskers cannot be negative.
            xerr=[[max(0.0, rate.rate - low)], [max(0.0, high - rate.rate)]],
            color=INK,
            linewidth=1.4,
            capsize=4,
        )
        axes.text(
            1.02,
            position,
            f"{rate.rate:.1%}  (n={rate.count})",
            va="center",
            fontsize=9.5,
            color=INK,
            transform=axes.get_yaxis_transform(),
        )
    axes.axvline(0.5, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.0)
    axes.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    confidences = sorted({f"{rate.confidence:.4g}" for rate in rates.values()})
    axes.set_xlabel(
        f"wins + half of ties; whiskers: {', '.join(f'{float(c):.4g}' for c in confidences)} interval", color=MUTED
    )
    axes.xaxis.label.set_fontsize(9)
    return figure


def schedule_figure(record: Mapping[str, Any], title: str = "") -> Figure:
    """The scales that dynamic guidance chose, above the standardised scores of every candidate, by step.

    ``record``: of :meth:`DynamicGuidance.records`: "scales", "candidates", "searched", "scores" by evaluator.
    """
    from matplotlib.figure import Figure

    names = list(record["scores"])
    figure = Figure(figsize=(7, 2.2 * (1 + len(names))), layout="constrained")
    axes = figure.subplots(1 + len(names), 1, sharex=True, squeeze=False)[:, 0]
    axes[0].step(range(len(record["scales"])), record["scales"], where="mid", color=COLOURS[0])
    axes[0].set_ylabel("guidance scale", color=MUTED)
    axes[0].set_title(textwrap.fill(title, 70), loc="left", color=INK, fontsize=10)
    for axis, name in zip(axes[1:], names, strict=True):
        scores = np.array(record["scores"][name])
        for k, scale in enumerate(record["candidates"]):
            axis.plot(record["searched"], scores[:, k], color=COLOURS[k % len(COLOURS)], label=f"{scale:g}", lw=1)
        axis.set_ylabel(f"{name} (z)", color=MUTED)
    axes[1].legend(title="scale", fontsize=7, ncols=2)
    axes[-1].set_xlabel("step", color=MUTED)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred running mean of (n,) values over ``window`` points, shorter at both ends; NaN stays where values are not
    finite, and such values do not enter their neighbours' means."""
    finite = np.isfinite(values)
    if window == 1:
        return np.where(finite, values, np.nan)
    before, after = (window - 1) // 2, window // 2
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    start = np.maximum(np.arange(len(values)) - before, 0)
    stop = np.minimum(np.arange(len(values)) + after + 1, len(values))
    mean = (sums[stop] - sums[start]) / np.maximum(counts[stop] - counts[start], 1)
    return np.where(finite, mean, np.nan)


def _chart(size: tuple[float, float], title: str) -> tuple[Figure, Any]:
    # A Figure made without pyplot draws with Agg, needs no closing and leaves the user's notebook backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, 64), loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=9.5)
    axes.set_axisbelow(True)
    return figure, axes


def ordered_points(name: str, points: Sequence[tuple[float, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) steps in their order and (n,) values of a series; ``ValueError`` names a point that is no such pair."""
    if len(points) == 0:
        raise ValueError(f"series {name!r}: expected (step, value) points, got none")
    for index, point in enumerate(points):
        if len(point) != 2 or not math.isfinite(point[0]):
            raise ValueError(f"series {name!r}, point {index}: expected (finite step, value), got {point!r}")
    table = np.asarray(points, dtype=np.float64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return table[:, 0], table[:, 1]


def _check_grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]], row_labels: Sequence[str], column_labels: Sequence[str], upscale: int
) -> tuple[int, int]:
    if upscale < 1:
        raise ValueError(f"upscale: expected a whole number >= 1, got {upscale}")
    if not rows or not column_labels:
        raise ValueError("rows: expected at least one row and one column of pictures")
    if len(row_labels) != len(rows):
        raise ValueError(f"row_labels: expected {len(rows)} labels, one per row, got {len(row_labels)}")
    shape: tuple[int, ...] | None = None
    for r, pictures in enumerate(rows):
        if len(pictures) != len(column_labels):
            raise ValueError(
                f"rows[{r}]: expected {len(column_labels)} pictures, one per column label, got {len(pictures)}"
            )
        for c, pixels in enumerate(pictures):
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
                found = getattr(pixels, "dtype", type(pixels).__name__)
                raise ValueError(f"rows[{r}][{c}]: expected a uint8 array, got {found}")
            shape = shape or pixels.shape
            if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape or pixels.shape != shape:
                wanted = "(height, width, 3)" if pixels.shape == shape else f"{shape} as in rows[0][0]"
                raise ValueError(f"rows[{r}][{c}]: expected shape {wanted}, got {pixels.shape}")
    assert shape is not None
    return shape[0], shape[1]


def _font(name: str) -> ImageFont.FreeTypeFont:
    import matplotlib

    # matplotlib ships these files, so labels look the same on every machine.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), _FONT_SIZE)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}".strip()
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            fits = max((n for n in range(1, len(word)) if font.getlength(word[:n]) <= width), default=1)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line] if line else lines
