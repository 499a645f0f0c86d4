"""Evaluation: win rates with intervals, picture grids and charts, and self-contained HTML reports."""

from __future__ import annotations

from .figures import curve_figure, image_grid, schedule_figure, win_rate_bars
from .report import Report
from .stats import MeanInterval, WinRate, clustered_win_rate, paired_difference, win_rate

__all__ = [
    "MeanInterval",
    "Report",
    "WinRate",
    "clustered_win_rate",
    "curve_figure",
    "image_grid",
    "paired_difference",
    "schedule_figure",
    "win_rate",
    "win_rate_bars",
]
