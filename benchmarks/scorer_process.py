"""Rollouts with a reward here and in another process: what drawing on while it scores saves.

Both processes have one thread, so that two cores are one for each. Rewards are compared, too: they must be equal.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffusion_align.adapters import load_adapter
from diffusion_align.rewards import load_scorer
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.online.config import NFTConfig
from diffusion_align.training.online.rollout import RolloutEngine

from .harness import ratio_interval, time_interleaved, write_result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scorer-process", description=__doc__)
    parser.add_argument("--scorer", default="scenes-vp")
    parser.add_argument("--pictures", type=int, default=32, help="of a rollout")
    parser.add_argument("--steps", type=int, default=4, help="few, as of a fast model beside a large judge")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with served(args.scorer) as url, tempfile.TemporaryDirectory() as folder:
        engines = {name: engine(args, Path(folder), at) for name, at in (("here", args.scorer), ("elsewhere", url))}
        drawn = {name: each.draw(0).reward for name, each in engines.items()}
        variants = {name: lambda each=each: each.draw(0) for name, each in engines.items()}
        seconds = time_interleaved(variants, args.rounds)
    result: dict[str, Any] = {
        "scorer": args.scorer,
        "pictures": args.pictures,
        "steps": args.steps,
        "rewards_equal": torch.equal(drawn["here"], drawn["elsewhere"]),
        "speed_elsewhere_over_here": ratio_interval(seconds["here"], seconds["elsewhere"]),
    }
    write_result("scorer_process", result, args.out)


def engine(args: argparse.Namespace, folder: Path, scorer: str) -> RolloutEngine:
    """Draws with ``scenes-sdxl``, eight pictures at once."""
    prompts = folder / "prompts.txt"
    prompts.write_text("one large red star on a light background\ntwo small blue rings on a dark background\n")
    config = NFTConfig(
        dataset=str(prompts), num_generations=args.pictures // 2, prompts_per_rollout=2, rollout_batch_size=8,
        num_inference_steps=args.steps, output_dir=str(folder), mixed_precision="no", report_to="none",
    )  # fmt: skip
    adapter = load_adapter("scenes-sdxl").train_lora(rank=8)
    return RolloutEngine(config, adapter, build_accelerator(config), load_scorer(scorer))


@contextmanager
def served(scorer: str) -> Iterator[str]:
    """The scorer in a process of its own."""
    code = "import sys, torch; torch.set_num_threads(1); from diffusion_align.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "serve-scorer", scorer, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if " is at " in line)
            yield line.split(" is at ")[1].split(": give")[0]
        finally:
            process.terminate()
