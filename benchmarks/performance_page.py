"""``python -m benchmarks performance-page``: docs/performance.md from what ``python -m benchmarks gpu`` wrote."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .gpu.command import STAGES, verdict
from .harness import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
RESULT = RESULTS / "gpu.json"

HEAD = """# Performance on a GPU

<!-- made by `python -m benchmarks performance-page`: do not edit -->
"""
HOW = """
## How to measure

From a checkout, which need not be installed, on a machine with one GPU of 80 GB:

```bash
PYTHONPATH=. python -m benchmarks gpu --budget 480
python -m benchmarks performance-page
```

No weights are read for the stages of true size: random ones are made on the device. Rows that no longer fit the budget
are skipped, a row that fails says how, and the file is whole after every stage. `--small --out FOLDER` runs every stage
on the shipped miniature on a CPU; its figures are no results.

The stages, in this order:

"""


def render(record: dict[str, Any] | None) -> str:
    """The page; of no record, one that says so."""
    stages = "".join(f"{i}. {stage.title}\n" for i, stage in enumerate(STAGES, start=1))
    if record is None:
        return f"{HEAD}\n**There is no GPU result yet.** Nothing on this page was measured.\n{HOW}{stages}"
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    parts = [
        HEAD,
        f"{record['device']}; {record['size']}; {versions}; commit `{record['git_commit']}`.",
        f"Made by `{record['command']}` in {record['seconds']:.0f} s.\n",
        "## Goals\n",
        goals(record),
    ]
    for stage in record["stages"].values():
        parts += [f"\n## {stage['title']}\n", table(stage["rows"])]
    return "\n".join(parts) + HOW + stages


def goals(record: dict[str, Any]) -> str:
    """Every goal, its figure, and whether it was met."""
    lines = ["| stage | row | goal | found | |", "|---|---|---|---|---|"]
    for stage in record["stages"].values():
        for row in stage["rows"]:
            for goal in row["goals"]:
                found = "" if goal["value"] is None else shown(goal["value"])
                lines.append(f"| {stage['title']} | {row['row']} | {goal['text']} | {found} | {verdict(goal)} |")
    return "\n".join(lines) if len(lines) > 2 else "No row with a goal was measured."


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each row: its figures, or why there are none."""
    lines = ["| row | found |", "|---|---|"]
    for row in rows:
        if row["skipped"] is not None:
            told = f"skipped: {row['skipped']}"
        elif row["error"] is not None:
            told = f"failed: {row['error']['type']}: {row['error']['message'].splitlines()[0][:160]}"
        else:
            told = "; ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in row["figures"].items())
            told += "".join(f" ({note})" for note in row["notes"])
        lines.append(f"| {row['row']} | {told.replace('|', '/')} |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A figure as the page prints it; "-" where it was not measured."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(part)}" for name, part in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks performance-page", description=__doc__)
    parser.add_argument("--result", type=Path, default=RESULT, help="what the gpu benchmark wrote")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    args.out.write_text(render(read_record(args.result)))
    print(f"written to {args.out}")


def read_record(path: Path) -> dict[str, Any] | None:
    """The result, or None where there is none.

    Raises:
        ValueError: it is of a small run or a rehearsal, whose figures are no results.
    """
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    if not record["result"]:
        raise ValueError(f"{path}: made by a --small or --rehearse run; expected a whole one on a GPU")
    return record
