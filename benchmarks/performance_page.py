"""``python -m benchmarks performance-page``: docs/performance.md from what ``python -m benchmarks gpu`` wrote."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from .gpu.command import STAGES, verdict
from .harness import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
RESULT = RESULTS / "gpu.json"

HEAD = """# Performance on a GPU

<!-- made by `python -m benchmarks performance-page`: do not edit -->
"""
#: What a figure is called in a table's head.
LABELS = {
    "seconds_per_step": "s per step",
    "pairs_per_second": "pairs per s",
    "peak_gib": "peak GiB",
    "estimated_gib": "estimated GiB",
    "estimate_over_measured": "estimate / measured",
    "share_of_peak": "share of matmul peak",
    "share_without_recomputing": "counting no recomputation",
    "our_speed_over_its": "our speed / its",
    "our_memory_over_its": "our memory / its",
    "seconds_per_picture": "s per picture",
    "busy_ms": "device busy, ms",
    "device_idle": "device idle",
    "host_waits": "host waits per step",
}
#: Figures that are in the JSON alone, and endings of the names of such.
UNSHOWN = ("loss", "side", "bytes")
UNSHOWN_ENDINGS = ("waits_at", "longest_ms")
HOW = """
## How to measure

From a checkout, which need not be installed, on a machine with one GPU of 80 GB:

```bash
PYTHONPATH=. python -m benchmarks gpu --budget 560
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
        filled(f"{record['device']}; {record['size']}; {versions}; commit `{record['git_commit'][:12]}`."),
        f"Made in {record['seconds']:.0f} s by",
        f"`{record['command']}`.",
        "Everything that was found is in [benchmarks/results/gpu.json](../benchmarks/results/gpu.json).\n",
        "## Goals\n",
        goals(record),
        causes(record),
    ]
    for stage in record["stages"].values():
        parts += [f"\n## {stage['title']}\n", tables(stage["rows"])]
    return "\n".join(parts) + "\n" + HOW + stages


def goals(record: dict[str, Any]) -> str:
    """Every goal once: of rows that share it, how many met it, and the best of them."""
    lines = ["| stage | goal | rows that met it | best | |", "|---|---|---|---|---|"]
    for stage in record["stages"].values():
        judged: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for row in stage["rows"]:
            for goal in row["goals"]:
                judged.setdefault(goal["text"], []).append((goal, row["row"]))
        for text, found in judged.items():
            met = [(goal, row) for goal, row in found if goal["met"]]
            goal, row = best(met or found)
            value = "" if goal["value"] is None else f"{shown(goal['value'])} ({row})"
            lines.append(f"| {stage['title']} | {text} | {len(met)} of {len(found)} | {value} | {verdict(goal)} |")
    return "\n".join(lines) if len(lines) > 2 else "No row with a goal was measured."


def best(found: list[tuple[dict[str, Any], str]]) -> tuple[dict[str, Any], str]:
    """The row whose figure is furthest on the goal's good side; "within" and "at most" say that less is better."""
    less = any(word in found[0][0]["text"] for word in ("within", "at most", "memory"))
    return min(found, key=lambda each: (each[0]["value"] or 0.0) * (1 if less else -1))


def causes(record: dict[str, Any]) -> str:
    """Where the time of a step goes, if no row of it met its goal."""
    rows = record["stages"].get("step", {"rows": []})["rows"]
    goals = [goal for row in rows for goal in row["goals"] if "matmul" in goal["text"]]
    looked = [row for row in rows if row["row"].startswith("profile") and row["figures"]]
    if not looked or any(goal["met"] for goal in goals):
        return ""
    lines = ["\nHalf of the matmul peak was missed. Where the time of a step goes, measured kernel by kernel:\n"]
    for row in looked:
        figures = row["figures"]
        total = 1000 * figures["seconds_per_step"]
        kinds = {"the device waits for the host": total - figures["busy_ms"], **figures["kinds_ms"]}
        told = ", ".join(f"{kind} {max(spent, 0) / total:.0%}" for kind, spent in kinds.items())
        lines.append(filled(f"- {row['row'].removeprefix('profile, ')}: {told}."))
    lines.append(
        "\nWith small batches the host is what limits: it cannot start kernels as fast as the device runs them. With\n"
        "large ones it is what is no product: activations, sums, norms. `compile` joins those; see the last table."
    )
    return "\n".join(lines)


def tables(rows: list[dict[str, Any]]) -> str:
    """A table for every set of rows with the same figures, and a line for what is skipped, failed or nested."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    lines: list[str] = []
    for row in rows:
        if row["skipped"] is not None:
            lines.append(f"- {row['row']}: skipped, {row['skipped']}")
        elif row["error"] is not None:
            error = row["error"]
            lines.append(f"- {row['row']}: failed: {error['type']}: {error['message'].splitlines()[0][:160]}")
        else:
            flat = [name for name, value in row["figures"].items() if not isinstance(value, dict | list)]
            groups.setdefault(tuple(name for name in flat if name not in UNSHOWN), []).append(row)
            nested = {
                name: value
                for name, value in row["figures"].items()
                if isinstance(value, dict) and value and not name.endswith(UNSHOWN_ENDINGS)
            }
            told = [f"- {row['row']}, {name.replace('_', ' ')}: {shown(value)}" for name, value in nested.items()]
            lines += map(filled, [*told, *(f"- {row['row']}: {note}" for note in row["notes"])])
    parts = ["\n".join(table(names, group)) for names, group in groups.items()]
    return "\n\n".join(part for part in (*parts, "\n".join(lines)) if part)


def table(names: tuple[str, ...], rows: list[dict[str, Any]]) -> list[str]:
    """Rows with the same figures."""
    heads = [LABELS.get(name, name.replace("_", " ")) for name in names]
    lines = [f"| {' | '.join(['', *heads])} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        values = [shown(row["figures"][name]).replace("|", "/") for name in names]
        lines.append(f"| {' | '.join([row['row'], *values])} |")
    return lines


def filled(text: str) -> str:
    """One paragraph or list item in lines of at most 110 columns."""
    return textwrap.fill(text, 110, subsequent_indent="  " * text.startswith("- "), break_on_hyphens=False)


def shown(value: Any) -> str:
    """A figure as the page prints it; "-" where it was not measured."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(part)}" for name, part in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.3g}"
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
