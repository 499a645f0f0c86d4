"""Oracle scores of a shipped pipeline per guidance scale, on prompts it was not trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusion_align.adapters import load_adapter
from diffusion_align.demo import held_out_prompts
from diffusion_align.evaluation.compare import SamplingSettings, sample_and_score
from diffusion_align.rewards import load_scorer

from .harness import write_result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks base-quality", description=__doc__)
    parser.add_argument("--model", default="scenes-sdxl")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.5, 5.0, 7.0])
    parser.add_argument("--prompts", type=int, default=250)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    adapter, scorer, prompts = load_adapter(args.model), load_scorer("scenes-oracle"), held_out_prompts(args.prompts)
    rows: list[dict[str, Any]] = []
    for scale in args.scales:
        settings = SamplingSettings(num_inference_steps=args.steps, guidance_scale=scale)
        reward = sample_and_score(adapter, prompts, scorer, settings).reward
        assert reward is not None
        values = {"overall": reward.reward, **reward.aspects}
        row: dict[str, Any] = {"guidance_scale": scale}
        for name, scores in values.items():
            row[name] = {
                "mean": float(scores.mean()),
                "standard_error": float(scores.std() / len(scores) ** 0.5),
            }
        rows.append(row)
    result = {"model": args.model, "prompts": len(prompts), "steps": args.steps, "seed": settings.seed, "rows": rows}
    write_result(f"base_quality_{args.model.replace('-', '_')}", result, args.out)
