"""report.html of a comparison: verdicts first, then how they came about, and the pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_align.evaluation.arena import Board
from diffusion_align.evaluation.figures import reduced, win_rate_bars
from diffusion_align.evaluation.report import STAR, Report, favourite
from diffusion_align.evaluation.stats import WinRate
from diffusion_align.pictures import decoded_picture

from .comparison_table import by_category, headline
from .picture_drawing import Drawn
from .picture_jobs import Jobs


def write_page(
    out: Path, table: Mapping[str, Any], board: Board, drawn: Mapping[str, Drawn], jobs: Jobs, shown: int
) -> Path:
    """Write it; returns the file."""
    names = [side["name"] for side in table["sides"]]
    report = Report(" against ".join(names) if len(names) < 4 else f"{len(names)} sides compared")
    if table["warnings"]:
        report.text("\n".join(f"- **{line}**" for line in table["warnings"]))
    report.text(
        f"{table['prompts']['count']} prompts x {table['seeds_per_prompt']} seeds, the same noise on all sides; the "
        "prompt is the unit. Ties count half. Intervals are 95% ones that resample prompts; p-values are corrected for "
        "all verdicts here (Holm). **winner** is named where that leaves it sure at 5%; **could see** is the "
        "difference from 50% that a comparison like this one detects in 8 of 10 cases."
    )
    if table["verdicts"]:
        rows = [headline(verdict) for verdict in table["verdicts"]]
        report.table(rows, {cell for number, verdict in enumerate(table["verdicts"]) for cell in won(number, verdict)})
    else:
        report.text("**Nobody has judged yet.**")
    report.text(table["note"])
    for note in table["notes"]:
        report.text(f"**{note}**")
    shown_as_bars = [verdict for verdict in table["verdicts"] if verdict["label"] != "unmatched"]
    rates = {bar_name(verdict): WinRate.from_json(verdict["win_rate"]) for verdict in shown_as_bars}
    if rates:
        report.figure(win_rate_bars(rates, "Win rate over the baseline"), "Win rates with their intervals")
    add_ranking(report, table)
    if categories := by_category(table):
        report.text("## By category")
        report.table(categories)
    add_scales(report, table)
    add_pictures(report, table, board, drawn, jobs, shown)
    add_artefacts(report, table)
    add_cost(report, table)
    report.text("## Sides and settings")
    report.table([{"side": side["name"], "what": side["side"]} for side in table["sides"]])
    facts = {
        "baseline": table["baseline"],
        "guidance matched": table["match"],
        "prompts and seeds, SHA-256": table["prompts"]["sha256"],
        **table["versions"],
        "git commit": table["git_commit"] or "not known",
    }
    report.facts(facts)
    report.text(
        "`table.json` has every number, `details.parquet` every picture with its scores. The same again: "
        f"`diffusion-align evaluate {shlex.join(side_words(table))} --out {shlex.quote(str(out))} --resume`, with the "
        "other flags that were given."
    )
    return report.write(out)


def won(number: int, verdict: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Cells of a row of verdicts that name the winner, if there is one."""
    winner = verdict["winner"]
    if not winner:
        return []
    return [(number, "side" if winner == verdict["side"] else "over"), (number, "winner")]


def side_words(table: Mapping[str, Any]) -> list[str]:
    """The sides as they are written."""
    return [f"{side['name']}={side['side']}" if "=" not in side["name"] else side["side"] for side in table["sides"]]


def bar_name(verdict: Mapping[str, Any]) -> str:
    """Of a bar."""
    return f"{verdict['side']} over {verdict['baseline']}, {verdict['scorer']}"


def add_ranking(report: Report, table: Mapping[str, Any]) -> None:
    """Strengths of three sides or more."""
    if not table["strengths"]:
        return
    report.text(
        f"## Order\n\nBradley and Terry's model of all pairs of sides, on Elo's scale: {table['baseline']} has 1000, "
        "400 points are odds of 10 to 1. A rank is a range: the first and the last place that the data leave open."
    )
    rows = []
    for judge, places in table["strengths"].items():
        for each in places:
            first, last = each["rank"]
            rows.append(
                {
                    "judge": judge, "side": each["name"], "Elo": f"{each['elo']:.0f}",
                    "interval": f"[{each['interval'][0]:.0f}, {each['interval'][1]:.0f}]",
                    "rank": str(first) if first == last else f"{first} to {last}",
                }
            )  # fmt: skip
    report.table(rows)


def add_scales(report: Report, table: Mapping[str, Any]) -> None:
    """At which scales sides were put beside each other."""
    if table["scales"]:
        report.text("## Guidance scales")
        report.table([{"pictures": name, "scale": said} for name, said in table["scales"].items()])
    if table["curves"]:
        curves = {
            side: [(float(scale), mean) for scale, mean in curve.items()] for side, curve in table["curves"].items()
        }
        report.chart(curves, "Mean score by guidance scale, on the validation prompts", xlabel="scale")


def add_pictures(
    report: Report, table: Mapping[str, Any], board: Board, drawn: Mapping[str, Drawn], jobs: Jobs, shown: int
) -> None:
    """The first prompts' first pictures, one column a side; the first scorer's favourite is marked."""
    sides = [side["name"] for side in table["sides"]]
    scorer = next(iter(board.scores), None)
    rows: list[list[np.ndarray]] = []
    best: list[int | None] = []
    first_size = (0, 0)
    for number in range(min(shown, len(jobs.prompts))):
        place = number * jobs.per_prompt
        files = [(side, drawn[side].files[place]) for side in sides]
        pictures = [decoded_picture(file, f"side {side}: {file}") for side, file in files]
        if len({picture.size for picture in pictures}) > 1 or (rows and pictures[0].size != first_size):
            report.text("## Pictures\n\nNot shown here: they differ in size, and lie in the folders of their sides.")
            return
        first_size = pictures[0].size
        rows.append([reduced(np.asarray(picture)) for picture in pictures])
        best.append(None if scorer is None else favourite([float(board.of(scorer, side)[number, 0]) for side in sides]))
    if rows:
        marked = "" if scorer is None else f"; {STAR}is the best of a prompt by {scorer}, where one is"
        told = f"The first prompts in alphabetical order, first seed, not selected{marked}"
        report.text("## Pictures")
        report.pictures(rows, jobs.prompts[: len(rows)], sides, told, best)


def add_artefacts(report: Report, table: Mapping[str, Any]) -> None:
    """Figures of pictures, with what left the baseline's own spread marked."""
    if not table["artefacts"]:
        return
    report.text(
        "## Artefacts\n\nMeans over prompts. A figure is marked where it left what the baseline's own pictures vary by "
        "(grids, clipping, colours, edges, and how much a prompt's pictures differ; docs/diagnostics.md)."
    )
    rows: dict[str, dict[str, str]] = {}
    for side, figures in table["artefacts"].items():
        for change in figures:
            row = rows.setdefault(change["says"], {"figure": change["says"], "baseline": f"{change['baseline']:.3g}"})
            low, high = change.get("interval", (None, None))
            between = "" if low is None else f" (change {low:+.2g} to {high:+.2g})"
            row[side] = f"{change['side']:.3g}{between}" + (" ALARM" if change["alarm"] else "")
    report.table(
        [{"figure": "", "baseline": "", **dict.fromkeys(table["artefacts"], ""), **row} for row in rows.values()]
    )


def add_cost(report: Report, table: Mapping[str, Any]) -> None:
    """What the pictures took."""
    report.text("## Cost")
    rows = []
    for name, cost in table["cost"].items():
        times = table["times"][name]
        peak = times["peak_bytes"]
        rows.append(
            {
                "pictures": name,
                "denoiser calls a picture": "" if cost["denoiser_calls"] is None else f"{cost['denoiser_calls']:g}",
                "scorer calls a picture": "" if cost["scorer_calls"] is None else f"{cost['scorer_calls']:g}",
                "seconds": "" if times["seconds"] is None else f"{times['seconds']:.1f}",
                "peak memory, GiB": "" if peak is None else f"{peak / 2**30:.2f}",
            }
        )
    report.table(rows)
