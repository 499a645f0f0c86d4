"""Run the stages in their order, within a budget of seconds, and write what they found after each."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffusion_align.environment import git_commit, versions

from ..harness import RESULTS, device_name
from . import baselines, coding, compiling, guiding, machine, methods, product, step
from .flow import stage as flow
from .reference import start_helpers, stop_helpers
from .rows import Row, RowRecord, Stage
from .workshop import REHEARSAL, SMALL, TRUE, Workshop, write_json

STAGES: tuple[Stage, ...] = (
    machine.STAGE,
    product.STAGE,
    step.STAGE,
    baselines.STAGE,
    coding.STAGE,
    guiding.STAGE,
    methods.STAGE,
    compiling.STAGE,
    flow.STAGE,
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=560.0, help="seconds; what no longer fits is skipped")
    parser.add_argument("--out", type=Path, default=None, help="folder for gpu.json (benchmarks/results)")
    parser.add_argument("--small", action="store_true", help="every stage on scenes-sdxl, on any device, in a minute")
    parser.add_argument("--rehearse", action="store_true", help="true size, but few steps: does everything run?")
    parser.add_argument("--commit", default=git_commit(), help="of this checkout, where it has no git")
    parser.add_argument("--stages", nargs="*", default=None, choices=[stage.key for stage in STAGES])
    args = parser.parse_args(argv)
    if not args.small and not torch.cuda.is_available():
        parser.error("no GPU is here: SDXL at its true size needs one (--small runs on a CPU)")
    if (args.small or args.rehearse) and args.out is None:
        parser.error("--small and --rehearse need --out: their figures are no results")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        scale = SMALL if args.small else REHEARSAL if args.rehearse else TRUE
        shop = Workshop(scale, device, Path(folder))
        chosen = [stage for stage in STAGES if args.stages is None or stage.key in args.stages]
        run_stages(chosen, shop, args.budget, (args.out or RESULTS) / "gpu.json", args.commit)


def run_stages(
    stages: list[Stage],
    shop: Workshop,
    budget: float,
    out: Path,
    commit: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure every row that fits ``budget`` seconds; ``out`` is whole after every stage."""
    started = clock()
    record: dict[str, Any] = {
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "git_commit": commit,
        "device": device_name(),
        "versions": versions(),
        "size": shop.scale.name,
        "true_size": shop.scale.true_size,
        "result": shop.scale is TRUE,
        "budget": budget,
        "stages": {},
    }
    start_helpers(shop)
    try:
        for stage in stages:
            rows = record["stages"].setdefault(stage.key, {"title": stage.title, "rows": []})["rows"]
            for row in stage.rows(shop):
                found = attempt(stage, row, shop, budget - (clock() - started))
                rows.append(asdict(found))
                print(f"{clock() - started:6.1f} s  {stage.key}: {told(found)}", flush=True)
            record["seconds"] = round(clock() - started, 1)
            write_json(out, record)
    finally:
        stop_helpers(shop)
    print(f"written to {out}")
    return record


def attempt(stage: Stage, row: Row, shop: Workshop, left: float) -> RowRecord:
    """One row, whatever happens in it."""
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        return RowRecord(row.name, skipped=f"{row.needs} is not installed")
    if left < (row.seconds if shop.scale.true_size else 0):
        return RowRecord(row.name, skipped=f"budget: needs about {row.seconds:g} s, {max(left, 0):.0f} s are left")
    started = time.perf_counter()
    try:
        finding = row.measure(shop)
    except Exception as error:  # out of memory, too: the rows after this one may still fit
        tail = traceback.format_exc(limit=-4).strip().splitlines()[-8:]
        failure = {"type": type(error).__name__, "message": str(error)[:500], "traceback": tail}
        record = RowRecord(row.name, round(time.perf_counter() - started, 2), error=failure)
    else:
        record = RowRecord.of(row, time.perf_counter() - started, finding)
        shop.found[f"{stage.key}/{row.name}"] = finding.figures
    shop.free()
    return record


def told(record: RowRecord) -> str:
    """A row in one line."""
    if record.skipped is not None:
        return f"{record.row}: skipped, {record.skipped}"
    if record.error is not None:
        return f"{record.row}: {record.error['type']}: {record.error['message'].splitlines()[0][:120]}"
    figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.figures.items())
    goals = "".join(f"; {goal['text']}: {verdict(goal)}" for goal in record.goals)
    return f"{record.row}: {figures[:300]}{goals}"


def verdict(goal: dict[str, Any]) -> str:
    """Met, missed, or why neither is known."""
    if goal["met"] is None:
        return str(goal["reason"])
    return "met" if goal["met"] else "missed"
