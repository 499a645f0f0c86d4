"""Ways to guide on the embedded world: what ``diffusion-align evaluate guidance`` measures, and what a step costs.

Parts: ``table`` (win rates over the best static scale), ``overhead`` (dynamic guidance's time over static guidance's).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusion_align.adapters import load_adapter
from diffusion_align.demo import held_out_prompts
from diffusion_align.evaluate import guidance_table
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.evaluators import load_evaluator
from diffusion_align.options import EvaluateGuidanceOptions
from diffusion_align.sampling.sampler import sample

from .harness import RESULTS, ratio_interval, time_interleaved, write_result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scenes-guidance", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--ways", nargs="+", choices=("dynamic", "usual"), default=["dynamic", "usual"])
    parser.add_argument("--static", type=float, default=None, help="best static scale, if known: no sweep")
    parser.add_argument("--selector", default=None, help="scorer of the best-of-2 row, e.g. scenes-vp")
    parser.add_argument("--rounds", type=int, default=10, help="of the timing")
    parser.add_argument("--out", type=Path, default=RESULTS / "scenes_guidance.json")
    args = parser.parse_args(argv)
    for part in args.parts:
        store(args.out, part, {"command_arguments": argv, **PARTS[part](args)})


def measured(out: Path) -> dict[str, Any]:
    """The parts in the file now: they may be measured one at a time, and two at once."""
    kept = json.loads(out.read_text()) if out.is_file() else {}
    return {part: kept[part] for part in PARTS if part in kept}


def store(out: Path, part: str, found: dict[str, Any]) -> None:
    """Put one part into the file, beside the others."""
    write_result("scenes_guidance", {**measured(out), part: found}, out)


def table(args: argparse.Namespace) -> dict[str, Any]:
    """The comparison with the shipped evaluator and the defaults; written after each row: it takes an hour.

    Rows measured earlier for the same static scale are kept, so that ``--ways`` may be measured one at a time.
    """
    options = EvaluateGuidanceOptions(
        num_prompts=args.prompts, selector=args.selector, ways=tuple(args.ways), static=args.static
    )

    def joined(found: dict[str, Any]) -> dict[str, Any]:
        earlier = measured(args.out).get("table", {})
        if earlier.get("best_static") != found["best_static"]:
            return found
        sweep = found["sweep_on_validation"] or earlier["sweep_on_validation"]
        return {**found, "sweep_on_validation": sweep, "rows": {**earlier["rows"], **found["rows"]}}

    def keep(found: dict[str, Any]) -> None:
        store(args.out, "table", joined(found))

    return joined(guidance_table(options, keep))


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling time of dynamic guidance (5 scales, 3 evaluators) over static guidance, whole pictures, one run."""
    adapter, prompts = load_adapter("scenes-sdxl"), held_out_prompts(32)
    guider = DynamicGuidance(kinds=("alignment", "fidelity", "preference"), candidates=(2.0, 2.5, 3.5, 5.0, 6.0))
    guider.use(load_evaluator("scenes-sdxl-evaluator"))
    options: dict[str, Any] = {"num_inference_steps": 10, "seeds": list(range(32)), "batch_size": 32}

    def draw(guidance: Any) -> Callable[[], Any]:
        def run() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                sample(adapter, prompts, guidance=guidance, **options)

        return run

    seconds = time_interleaved({"static": draw(5.0), "dynamic": draw(guider)}, rounds=args.rounds)
    return {"dynamic_over_static": ratio_interval(seconds["dynamic"], seconds["static"])}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"overhead": overhead, "table": table}
