"""What the runs of a sweep came to: results.json, a table, and a report."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from diffusion_align.commands.console.text_table import aligned
from diffusion_align.evaluation.report import Report
from diffusion_align.files import write_whole
from diffusion_align.training.engine.metrics import read_metrics

from .running import outcome
from .spec import Run, Sweep

#: Curves in the report: those of the best settings.
CURVES = 8


@dataclass(frozen=True)
class Result:
    """What one setting came to over its seeds.

    Attributes:
        tried: the settings.
        seeds: those whose runs are done and logged the metric.
        mean: of the metric's last values; None: no run has one.
        low, high: of win rates the mean of the runs' 95% intervals, which seeds on the same prompts do not narrow; of
            other metrics the least and the largest of the seeds; None: of one seed there is no spread.
        seconds: of all its runs.
        problems: of runs that failed or did not log the metric.
        folders: of its runs.
    """

    tried: Mapping[str, Any]
    seeds: Sequence[int]
    mean: float | None
    low: float | None
    high: float | None
    seconds: float
    problems: Sequence[str]
    folders: Sequence[str]


def write_results(sweep: Sweep, runs: Sequence[Run], results: Sequence[Result], winner: str = "") -> None:
    """results.json and report.html in the sweep's folder.

    Args:
        winner: what was found when the best one was looked at once more.
    """
    said = {
        "metric": sweep.metric,
        "maximize": sweep.maximize,
        "winner": winner or None,
        "results": [asdict(result) for result in results],
    }
    write_whole(sweep.out / "results.json", (json.dumps(said, indent=2) + "\n").encode())
    report(sweep, results, runs, winner).write(sweep.out)


def ranked(sweep: Sweep, runs: Sequence[Run]) -> list[Result]:
    """A result for each setting, best first, those without a value last."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.tried, sort_keys=True, default=str), []).append(run)
    found = [result_of(sweep.metric, group) for group in groups.values()]
    sign = -1 if sweep.maximize else 1
    return sorted(found, key=lambda result: (result.mean is None, sign * (result.mean or 0.0)))


def result_of(metric: str, runs: Sequence[Run]) -> Result:
    """Of the runs of one setting."""
    values, lows, highs, seeds, problems, seconds = [], [], [], [], [], 0.0
    for run in runs:
        ended = outcome(run)
        seconds += ended.get("seconds", 0.0)
        if ended.get("status") != 0:
            problems.append(f"{run.folder.name}: {ended.get('error') or 'not done'}")
            continue
        lines = read_metrics(run.folder / "metrics.jsonl")
        line = next((line for line in reversed(lines) if metric in line), None)
        if line is None:
            names = sorted({name for each in lines for name in each})
            near = ", ".join(difflib.get_close_matches(metric, names, n=3)) or ", ".join(names[:5])
            problems.append(f"{run.folder.name}: logged no {metric}; near: {near}")
            continue
        values.append(line[metric])
        seeds.append(run.config.seed)
        if f"{metric}_low" in line and f"{metric}_high" in line:
            lows.append(line[f"{metric}_low"])
            highs.append(line[f"{metric}_high"])
    low = high = None
    if lows:
        low, high = fmean(lows), fmean(highs)
    elif len(values) > 1:
        low, high = min(values), max(values)
    mean = fmean(values) if values else None
    return Result(runs[0].tried, seeds, mean, low, high, seconds, problems, [run.folder.name for run in runs])


def rows(sweep: Sweep, results: Sequence[Result]) -> list[dict[str, str]]:
    """The table's lines."""
    names = list(dict.fromkeys(name for result in results for name in result.tried))
    return [
        {
            **{name: str(result.tried.get(name, "")) for name in names},
            sweep.metric: "-" if result.mean is None else f"{result.mean:.4g}",
            "interval": "-" if result.low is None else f"[{result.low:.4g}, {result.high:.4g}]",
            "seeds": " ".join(map(str, result.seeds)) or "-",
            "seconds": f"{result.seconds:.0f}",
        }
        for result in results
    ]


def told(sweep: Sweep, results: Sequence[Result], winner: str = "") -> str:
    """The table as text, then what went wrong."""
    text = aligned(rows(sweep, results))
    text += [problem for result in results for problem in result.problems]
    text += [winner] if winner else []
    return "\n".join([*text, f"report: {sweep.out / 'report.html'}"])


def report(sweep: Sweep, results: Sequence[Result], runs: Sequence[Run], winner: str = "") -> Report:
    """One page: the table, curves of the best settings, and what failed."""
    page = Report(f"sweep: {sweep.out.name}")
    page.facts(
        {
            "base": sweep.base,
            "metric": f"{sweep.metric}, {'more' if sweep.maximize else 'less'} is better",
            "runs": f"{sum(outcome(run).get('status') == 0 for run in runs)} of {len(runs)} done",
            "folder": str(sweep.out),
        }
    )
    if winner:
        page.text(f"**{winner}**. This is the figure to believe: the best of many looks better than it is.")
    page.text(
        "Of each run the metric's last value, of each setting the mean over its seeds. Intervals of win rates are 95% "
        "ones over prompts, the mean of the seeds'; of other metrics the least and the largest of the seeds."
    )
    page.table(rows(sweep, results))
    by_name = {run.folder.name: run for run in runs}
    curves = {}
    for result in results[:CURVES]:
        lines = read_metrics(by_name[result.folders[0]].folder / "metrics.jsonl")
        points = [(line["step"], line[sweep.metric]) for line in lines if sweep.metric in line]
        if len(points) > 1:
            curves[result.folders[0]] = points
    if curves:
        page.chart(curves, f"{sweep.metric} over steps, first seed of the best settings")
    problems = [problem for result in results for problem in result.problems]
    if problems:
        page.text("## Not in the table\n\n" + "\n".join(f"- {problem}" for problem in problems))
    page.text("Every run has its own report.html, config.yaml and log.txt in its folder.")
    return page
