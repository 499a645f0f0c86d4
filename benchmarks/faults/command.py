"""The command line of the faults that are counted."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, write_result

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
    out, wrong = args.out or RESULTS / "faults.json", False
    for name in args.commands:  # commands may be counted one at a time, and two at once
        with tempfile.TemporaryDirectory() as folder:
            count = count_kills(COMMANDS[name], Path(folder), args.kills, args.seed)
        kept = json.loads(out.read_text())["kills"] if out.is_file() else {}
        kills = kept | {name: asdict(count) | {"seed": args.seed}}
        write_result("faults", {"kills": {each: kills[each] for each in COMMANDS if each in kills}}, out)
        wrong |= count.equal != count.tried
    if wrong:
        raise SystemExit(1)
