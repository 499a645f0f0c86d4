"""Win rates of DPO and InPO over the base on the embedded world: three training seeds, held-out prompts, the oracle.

Also the learning curves (win rate over steps on validation prompts), from which steps-to-win-rate is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_align.adapters import load_adapter
from diffusion_align.commands.demo import Outcome, run_method
from diffusion_align.evaluation import clustered_win_rate
from diffusion_align.evaluation.compare import Sampled, SamplingSettings, sample_and_score
from diffusion_align.rewards import load_scorer
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.training.settings import load_recipe

from ..harness import write_result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scenes-dpo-inpo", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=("dpo", "inpo"), default=["dpo", "inpo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps; unset: the recipes' own")
    parser.add_argument("--prompts", type=int, default=250)
    parser.add_argument("--eval-steps", type=int, default=20, help="steps between points of the learning curve")
    parser.add_argument("--validation-prompts", type=int, default=64, help="prompts of the learning curve")
    parser.add_argument("--target", type=float, default=0.65, help="win rate of the steps-to-win-rate figure")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    prompts, scorer, settings = held_out_prompts(args.prompts), load_scorer("scenes-oracle"), SamplingSettings()
    base = sample_and_score(load_adapter("scenes-sdxl"), prompts, scorer, settings)
    result: dict[str, Any] = {
        "prompts": len(prompts),
        "seeds": args.seeds,
        "sampling": settings.to_json(),
        "methods": {},
    }
    for method in args.methods:
        outcomes = []
        for seed in args.seeds:
            config = load_recipe(
                f"scenes_{method}",
                seed=seed,
                output_dir=str(args.work / f"{method}-{seed}"),
                overwrite_output_dir=True,
                report_to="none",
                progress=False,
                eval_steps=args.eval_steps,
                num_validation_prompts=args.validation_prompts,
                **({} if args.steps is None else {"max_steps": args.steps}),
            )
            outcome = run_method(config, prompts, base, scorer, settings)
            print(f"{method}, seed {seed}: {outcome.win_rate}", flush=True)
            outcomes.append(outcome)
        result["methods"][method] = summarize(outcomes, base, args.target)
        write_result("scenes_dpo_inpo", result, args.out)  # after each method: a long benchmark may not live to its end


def summarize(outcomes: list[Outcome], base: Sampled, target: float) -> dict[str, Any]:
    """Pooled and single win rates, mean scores and learning curves of one method's seeds."""
    assert base.reward is not None
    differences = []
    for outcome in outcomes:
        assert outcome.sampled.reward is not None
        differences.append((outcome.sampled.reward.reward - base.reward.reward).tolist())
    curves = [
        [(line["step"], line["eval/win_rate"]) for line in outcome.result.history if "eval/win_rate" in line]
        for outcome in outcomes
    ]
    reached = [next((int(step) for step, rate in curve if step > 0 and rate >= target), None) for curve in curves]
    aspects = {}
    for name in base.reward.aspects:
        values = [o.sampled.reward.aspects[name].mean().item() for o in outcomes if o.sampled.reward is not None]
        aspects[name] = {"base": base.reward.aspects[name].mean().item(), "policy": float(np.mean(values))}
    return {
        "win_rate": clustered_win_rate(differences).to_json(),
        "per_seed": [outcome.win_rate.to_json() for outcome in outcomes],
        "steps": outcomes[0].result.step,
        "pairs_per_step": outcomes[0].config.per_device_train_batch_size,
        "scores": aspects,
        "learning_curves": curves,
        f"steps_to_win_rate_{target:g}": reached,
    }
