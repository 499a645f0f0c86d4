"""Training runs of a model of true size: memory measured, and as ``--dry-run`` had it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .use import estimate
from .watched import in_gib, run_command

STEPS = 2
FULL = ("--full-finetuning",)
#: Flags of each run; those that begin with "cached" read latents and prompts from disk.
RUNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "LoRA, 1 pair of 256 px": ("--resolution", "256"),
        "LoRA, 1 pair of 256 px, checkpointing full": ("--resolution", "256", "--gradient-checkpointing", "full"),
        "LoRA, 4 pairs of 128 px, checkpointing attention": (
            "--resolution", "128", "--gradient-checkpointing", "attention", "--per-device-train-batch-size", "4",
        ),
        "cached, LoRA, 1 pair of 256 px": ("--resolution", "256"),
        "full, Adafactor, 1 pair of 64 px": ("--resolution", "64", *FULL, "--optim", "adafactor"),
        "cached, full, Adafactor, 1 pair of 128 px": ("--resolution", "128", *FULL, "--optim", "adafactor"),
        "full, AdamW, 1 pair of 64 px": ("--resolution", "64", *FULL, "--optim", "adamw"),
        "cached, full, AdamW, 1 pair of 64 px": ("--resolution", "64", *FULL, "--optim", "adamw"),
    }
)  # fmt: skip


def measure(name: str, model: list[str], pairs: Path, work: Path, before: int, threads: int) -> dict[str, Any]:
    """Two steps of the run ``name``: the optimiser's state is there in the second. It is then ended."""
    flags, out = list(RUNS[name]), work / "memory-run"
    arguments = ["train", "dpo", *model, "--dataset", str(pairs), "--output-dir", str(out), *flags]
    arguments += ["--max-steps", "3", "--logging-steps", "1"]
    if name.startswith("cached"):
        cache = work / f"cache-{flags[1]}"
        arguments += ["--cache-dir", str(cache)]
        if not cache.is_dir():
            cached = ["--cache-dir", str(cache), "--resolution", flags[1], "--dataset", str(pairs), *model]
            run_command(["cache", *cached], threads)
    estimated = estimate(run_command([*arguments, "--dry-run"], threads).output)
    shutil.rmtree(out, ignore_errors=True)
    log = out / "metrics.jsonl"
    watched = run_command(arguments, threads, lambda: log.is_file() and log.read_text().count("\n") >= STEPS)
    shutil.rmtree(out)
    measured = in_gib(watched.own - before)
    return {
        "run": name,
        "resident_gib": in_gib(watched.resident),
        "measured_gib": measured,
        "estimate_gib": estimated,
        "ratio": round(estimated / measured, 3),
    }
