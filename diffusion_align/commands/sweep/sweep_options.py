"""Options of ``diffusion-align sweep``. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusion_align.commands.options import Options


@dataclass(frozen=True)
class SweepOptions(Options):
    """Train with many settings, one folder each, and compare a metric. The same command again goes on where it was.

    Flags take the place of what the file says.
    """

    counts: ClassVar[tuple[str, ...]] = ("run_cap", "jobs")

    file: str | None = None
    """YAML file with base, method, parameters, settings, seeds, metric (docs/sweeps.md; the flag may be left out if it
    comes first)."""
    base: str | None = None
    """What all runs share: a recipe (shipped name or file), or a training method, for its defaults."""
    values: tuple[str, ...] = ()
    """Settings that are tried, e.g. beta=500,1000,2000 learning_rate=1e-4,1e-3."""
    set: tuple[str, ...] = ()
    """Settings that all runs have, e.g. max_steps=50 eval_steps=50."""
    method: Literal["grid", "random", "list"] | None = None
    """All combinations; run_cap of them, drawn at random; or those that the file lists as runs. Unset: grid."""
    run_cap: int | None = None
    """random: how many settings are drawn. Else a limit, above which nothing is started."""
    seeds: tuple[int, ...] | None = None
    """Training seeds of each; unset: the base's own."""
    metric: str | None = None
    """What counts, as metrics.jsonl names it; of each run the last value. Unset: eval/win_rate."""
    goal: Literal["maximize", "minimize"] | None = None
    """Whether much of it is good. Unset: maximize."""
    out: str | None = None
    """Folder of the runs, results.json and report.html. Unset: runs/sweep, or runs/ and the file's name."""
    jobs: int | None = None
    """Runs at once. Unset: one, or one on each of the devices."""
    devices: tuple[str, ...] = ()
    """GPUs that runs take in turn, as CUDA_VISIBLE_DEVICES names them; unset: all runs see all."""
    dry_run: bool = False
    """Say which runs there would be and what they cost, and stop."""
