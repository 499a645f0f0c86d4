"""What was found, as table.json and details.parquet hold it and as it is told on the screen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_align.commands.console.text_table import aligned, filled
from diffusion_align.environment import git_commit, versions
from diffusion_align.evaluation.arena import Board, Verdict, strengths
from diffusion_align.evaluation.arena.strengths import Strength
from diffusion_align.evaluation.arena.votes import PEOPLE, Vote, vote_wins
from diffusion_align.evaluation.artefacts import Change, Figures, Spread, changes, paired_changes
from diffusion_align.files import write_parquet, write_whole

from .picture_drawing import Drawn
from .picture_jobs import Jobs
from .scale_matching import Plan

#: Stands beside every table of scorers.
NO_PEOPLE = (
    "Scorers are no people: the best automatic judge of GenAI-Arena agreed with people's verdicts on quality only at "
    "r = 0.22 (arXiv 2406.04485)."
)


def comparison_table(
    board: Board,
    plan: Plan,
    found: Sequence[Verdict],
    votes: Sequence[Vote],
    figures: Mapping[str, Figures] | None,
    drawn: Mapping[str, Drawn],
    learned: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """A JSON object; what differs from run to run, seconds and memory, is under "times" alone.

    Args:
        facts: what was compared.
    """
    return {
        **facts,
        "baseline": plan.baseline,
        "scorers": {
            scorer: {
                "trained_on": {side: named[scorer] for side, named in learned.items() if scorer in named},
                "means": {side: float(board.of(scorer, side).mean()) for side in board.sides},
            }
            for scorer in board.scores
        },
        "note": NO_PEOPLE,
        "verdicts": [verdict.to_json() for verdict in found],
        "strengths": {
            judge: [vars(each) | {"interval": list(each.interval), "rank": list(each.rank)} for each in places]
            for judge, places in ranking(board, plan, votes)
        },
        "curves": {side: {f"{scale:g}": mean for scale, mean in curve.items()} for side, curve in plan.curves.items()},
        "scales": dict(plan.scales),
        "cost": {
            name: {"denoiser_calls": pictures.calls, "scorer_calls": pictures.scorer_calls}
            for name, pictures in drawn.items()
        },
        "artefacts": artefacts(plan, figures),
        "versions": versions(),
        "git_commit": git_commit(),
        "times": {
            name: {"seconds": pictures.seconds, "peak_bytes": pictures.peak_bytes} for name, pictures in drawn.items()
        },
    }


def ranking(board: Board, plan: Plan, votes: Sequence[Vote]) -> Iterator[tuple[str, list[Strength]]]:
    """Strengths by judge, strongest first; of two sides there is no order to find.

    Raises:
        ValueError: votes that do not connect all sides.
    """
    if len(plan.ranked) < 3:
        return
    if votes:
        yield PEOPLE, ordered(strengths(vote_wins(votes, plan.ranked), plan.ranked, plan.baseline))
    for scorer in board.scores:
        yield scorer, ordered(strengths(board.wins(scorer, plan.ranked), plan.ranked, plan.baseline))


def ordered(places: Sequence[Strength]) -> list[Strength]:
    """Strongest first."""
    return sorted(places, key=lambda each: -each.elo)


def artefacts(plan: Plan, figures: Mapping[str, Figures] | None) -> dict[str, list[dict[str, Any]]]:
    """Figures of each side of the headline contests beside its baseline's; none where they could not be measured.

    The artefact monitor's are judged by paired intervals, others by the baseline's own spread.
    """
    if figures is None:
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for contest in plan.contests:
        base = figures[contest.baseline]
        if contest.label == "unmatched" or base.prompts < 2:
            continue
        side, monitored = figures[contest.side], base.near_duplicates is not None
        judged = paired_changes(side, base) if monitored else changes(side, base, Spread.of(base))
        found[contest.side] = [change_row(change) for change in judged]
    return found


def change_row(change: Change) -> dict[str, Any]:
    """A figure as table.json holds it."""
    row: dict[str, Any] = {
        "figure": change.name, "says": change.rule.says, "baseline": change.base, "side": change.tuned,
        "allowed": change.allowed, "alarm": change.alarmed,
    }  # fmt: skip
    return row if change.interval is None else row | {"interval": list(change.interval)}


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """As JSON, whole or not at all."""
    write_whole(path, json.dumps(table, indent=2).encode() + b"\n")


def write_details(path: Path, board: Board, jobs: Jobs, drawn: Mapping[str, Drawn]) -> None:
    """A row for each picture: prompt, category, seed, side, file, hash, every score (more is better)."""
    from datasets import Dataset

    rows = []
    for side, name in enumerate(board.sides):
        for index, (prompt, seed) in enumerate(jobs.pairs()):
            place = divmod(index, jobs.per_prompt)
            file = drawn[name].files[index]
            own = file.is_relative_to(path.parent)
            row: dict[str, Any] = {
                "side": name, "prompt": prompt, "category": board.categories.get(prompt, ""), "seed": seed,
                "picture": str(file.relative_to(path.parent) if own else file), "sha256": drawn[name].hashes[index],
            }  # fmt: skip
            rows.append(row | {scorer: float(scores[side][place]) for scorer, scores in board.scores.items()})
    write_parquet(path, Dataset.from_list(rows))


def headline(verdict: Mapping[str, Any]) -> dict[str, str]:
    """A verdict as cells of a table."""
    rate, gap = verdict["win_rate"], verdict["difference"]
    return {
        "side": verdict["side"],
        "over": verdict["baseline"],
        "guidance": verdict["label"] or "as given",
        "judge": verdict["scorer"],
        "win rate": f"{rate['rate']:.1%} [{rate['interval'][0]:.1%}, {rate['interval'][1]:.1%}]",
        "difference": "" if gap is None else f"{gap['mean']:+.4g} [{gap['interval'][0]:.3g}, {gap['interval'][1]:.3g}]",
        "p (Holm)": "< 0.001" if verdict["p_holm"] < 0.001 else f"{verdict['p_holm']:.3f}",
        "winner": verdict["winner"] or "not sure",
        "could see": f"{verdict['detectable']:.1%}" if verdict["detectable"] < 0.5 else "nothing",
    }


def by_category(table: Mapping[str, Any]) -> list[dict[str, str]]:
    """Win rates of each verdict by category, as rows of a table; empty where prompts have none."""
    found = []
    for verdict in table["verdicts"]:
        if verdict["categories"]:
            cells = {
                name: f"{rate['rate']:.0%} [{rate['interval'][0]:.0%}, {rate['interval'][1]:.0%}]"
                for name, rate in verdict["categories"].items()
            }
            guidance = verdict["label"] or "as given"
            found.append({"side": verdict["side"], "guidance": guidance, "judge": verdict["scorer"], **cells})
    return filled(found)


def alarmed(table: Mapping[str, Any]) -> list[str]:
    """Figures that moved further than they may, in words."""
    return [
        f"{side}: {change['figure']} ({change['says']}) {change['baseline']:.3g} became {change['side']:.3g}"
        for side, rows in table["artefacts"].items()
        for change in rows
        if change["alarm"]
    ]


def told(table: Mapping[str, Any]) -> str:
    """The table for the screen."""
    lines = [*aligned([headline(verdict) for verdict in table["verdicts"]])]
    if table["strengths"]:
        lines.append("")
    for judge, places in table["strengths"].items():
        rows = [
            Strength(**each | {"interval": tuple(each["interval"]), "rank": tuple(each["rank"])}) for each in places
        ]
        lines.append(f"Elo by {judge} ({table['baseline']} = 1000): " + "; ".join(map(str, rows)))
    if categories := by_category(table):
        lines += ["", *aligned(categories)]
    if alarms := alarmed(table):
        lines += ["", "artefacts, beyond what the baseline's pictures vary by:", *(f"  {line}" for line in alarms)]
    return "\n".join([*lines, "", *(f"note: {note}" for note in table["notes"]), table["note"]])
