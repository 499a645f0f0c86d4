"""The command line of the faults that are counted."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.harness import write_result

from .kills import COMMANDS, count_kills

#: What the commands import late; the forks have it from here.
IMPORTED = (
    "diffusion_align.training.run",
    "diffusion_align.training.pairs.job",
    "diffusion_align.training.online.job",
    "diffusion_align.training.online.policy_gradient_job",
    "diffusion_align.commands.annotate",
    "diffusion_align.commands.score",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "diffusion_align.rewards.published.clip",
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="instants for each command")
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="file of the result (benchmarks/results/faults.json)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # other threads would not be there after the fork
    for name in IMPORTED:
        import_module(name)
    kills = {}
    for name in args.commands:
        with tempfile.TemporaryDirectory() as folder:
            kills[name] = asdict(count_kills(COMMANDS[name], Path(folder), args.kills, args.seed))
        print(name, kills[name], flush=True)
    write_result("faults", {"seed": args.seed, "kills": kills}, args.out)
    if any(count["equal"] != count["tried"] for count in kills.values()):
        raise SystemExit(1)
