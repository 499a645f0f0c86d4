"""Curves as SVG, for pages that must be quick to make: no picture is drawn here, the browser does it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from .figures import COLOURS, ordered_points, running_mean

#: Units of the drawing; a page shows it as wide as there is room.
WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 30


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], smooth: int = 1, xlabel: str = "step") -> str:
    """An SVG element with one line per series of (step, value) points, steps in any order.

    ``smooth`` is the width in points of a centred running mean; the raw points stay visible behind it. Values that are
    not finite leave a gap. Raises ``ValueError`` for no series, an empty series, a point that is not a
    (finite step, value) pair, or ``smooth`` < 1.
    """
    if not series:
        raise ValueError("series: expected at least one named series, got none")
    if smooth < 1:
        raise ValueError(f"smooth: expected a window of at least 1 point, got {smooth}")
    points = {name: ordered_points(name, found) for name, found in series.items()}
    across = _Axis.over(np.concatenate([steps for steps, _ in points.values()]), LEFT, WIDTH - RIGHT)
    up = _Axis.over(np.concatenate([values for _, values in points.values()]), HEIGHT - BOTTOM, TOP)
    drawn = [
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        for tick in up.ticks(4)
    ]
    drawn += [
        f'<text x="{across(tick):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{tick:.6g}</text>'
        for tick in across.ticks(5)
        if tick == round(tick)
    ]
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 1}" text-anchor="end">{escape(xlabel)}</text>')
    for index, (name, (steps, values)) in enumerate(points.items()):
        colour = COLOURS[index % len(COLOURS)]
        if smooth > 1:
            drawn.append(_line(steps, values, across, up, f'stroke="{colour}" stroke-opacity="0.3"'))
        mean = running_mean(values, smooth)
        drawn.append(_line(steps, mean, across, up, f'stroke="{colour}" stroke-width="1.8"', name))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
    return f'<svg {size} role="img" aria-label="{escape(", ".join(series))}">{"".join(drawn)}</svg>'


class _Axis:
    """From values to places."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    @classmethod
    def over(cls, values: NDArray[np.float64], start: float, end: float) -> _Axis:
        """Of all finite values; room around a single one."""
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            room = abs(low) / 2 or 0.5
            low, high = low - room, high + room
        return cls(low, high, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values inside, at most ``most`` and one: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _line(
    steps: NDArray[np.float64], values: NDArray[np.float64], across: _Axis, up: _Axis, style: str, name: str = ""
) -> str:
    """A path with gaps; what stands alone is a dot."""
    finite = np.isfinite(values)
    path = ""
    for index in np.flatnonzero(finite):
        place = f"{across(float(steps[index])):.1f},{up(float(values[index])):.1f}"
        begins = index == 0 or not finite[index - 1]
        ends = index + 1 == len(finite) or not finite[index + 1]
        path += f"{'M' if begins else 'L'}{place}" + ("h0" if begins and ends else "")
    title = f"<title>{escape(name)}</title>" if name else ""
    return f'<path d="{path}" fill="none" stroke-linecap="round" stroke-linejoin="round" {style}>{title}</path>'
