"""DPO, InPO and SmPO on pairs of the policy's own pictures and of others': win rates against steps, pairs and calls.

InPO's claim was made on Pick-a-Pic, whose pictures come from other models. The shipped pairs come from the policy's own
base, so that inversion leads back to where they came from. Here both kinds have the same prompts, users and size.

The learning rate is constant after the warm-up, so that the policy after k steps is that of a run of k steps. The file
is written after every point, points that it holds are not measured again, and killed runs go on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_align.adapters import load_adapter
from diffusion_align.data import load_pairs
from diffusion_align.evaluation import clustered_win_rate
from diffusion_align.evaluation.compare import SamplingSettings
from diffusion_align.evaluation.stats import paired_difference
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.scenes.make.pairs import RENDERED, SOURCES, make_pairs, split_file
from diffusion_align.training.engine.checkpoint import PREFIX, list_checkpoints
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_recipe

from ..harness import RESULTS, read_parts, write_result
from .noise_draws import SCORE, mean_scores, outcomes
from .online_methods import Exam, denoiser_calls

#: Who draws the pictures of each data set; nobody: the shipped pairs, which scenes-sdxl drew.
DATA: dict[str, tuple[str, ...]] = {
    "on-policy": (),
    "off-policy": ("scenes-sd", "scenes-uneven", RENDERED),
    **{source: (source,) for source in SOURCES[1:]},
}
#: Recipe of each method, and what is set otherwise. InPO's and SmPO's eta is the published one.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("scenes_dpo", {}),
    "inpo-10": ("scenes_inpo", {"inversion_eta": 0.1, "inversion_steps": 10}),
    "inpo-5": ("scenes_inpo", {"inversion_eta": 0.1, "inversion_steps": 5}),
    "smpo": (
        "scenes_inpo",
        {
            "inversion_eta": 0.1,
            "inversion_steps": 5,
            "renoise_iterations": 1,
            "pair_beta": 1.0,  # a sure pair has the recipe's beta
            "relabel_with": "scenes-vp-words",  # its score is the logit of Bradley and Terry
            "relabel_temperature": 1.0,
        },
    ),
    "inpo-recipe": ("scenes_inpo", {}),
}
#: Sampling steps of the pictures that are made here; the shipped ones had 20.
DRAWING_STEPS = 10

#: Metrics of a run that are kept.
LOGGED = ("implicit_accuracy", "margin", "rewards/chosen", "rewards/rejected", "chosen_error_up", "moved")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scenes-off-policy", description=__doc__)
    parser.add_argument("--data", nargs="+", choices=tuple(DATA), default=["on-policy", "off-policy"])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=["dpo", "inpo-10", "inpo-5", "smpo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps; more can be asked for later")
    parser.add_argument("--every", type=int, default=20, help="steps between points of the curves")
    parser.add_argument("--prompts", type=int, default=250, help="held-out prompts")
    parser.add_argument("--sampling-steps", type=int, default=20, help="of the pictures that are compared")
    parser.add_argument("--pairs", type=int, default=1000, help="training pairs that are made")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/off-policy"), help="pairs and runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "scenes_off_policy.json")
    args = parser.parse_args(argv)
    if args.steps % args.every:
        parser.error(f"--steps {args.steps} is no multiple of --every {args.every}: its end would not be measured")
    settings = SamplingSettings(num_inference_steps=args.sampling_steps)
    result = read_parts(args.out, ("prompts", "sampling", "pairs", "base_scores", "data", "rows", "logs"))
    wanted = {"prompts": args.prompts, "sampling": settings.to_json(), "pairs": args.pairs}
    for name, value in wanted.items():
        if result.get(name, value) != value:
            raise SystemExit(f"{args.out} was measured with {name} = {result[name]}, not {value}: give another --out")
    result = {"data": {}, "rows": {}, "logs": {}} | result | wanted
    datasets = {}
    for data in args.data:
        datasets[data] = prepare_data(data, args.work, args.pairs)
        result["data"].setdefault(data, told(datasets[data], DATA[data]))
    exam = None
    points = range(args.every, args.steps + 1, args.every)
    # All come to a point before one goes on to the next: what there is can be compared at any time.
    for seed, step, data, method in product(args.seeds, points, args.data, args.methods):
        name, folder = row_name(data, method, seed), args.work / f"{data}-{args.pairs}-{method}-{seed}"
        row = result["rows"].setdefault(name, {})
        if str(step) in row:
            result["logs"].setdefault(name, {}).update(learned(folder, args.every))
            continue
        if exam is None:
            exam = Exam.prepare(load_adapter("scenes-sdxl"), held_out_prompts(args.prompts), None, settings)
            result["base_scores"] = mean_scores(exam.base)
        config = settings_of(method, seed, step, datasets[data], folder, args)
        train(config)
        row[str(step)] = point(config, exam)
        result["logs"].setdefault(name, {}).update(learned(folder, args.every))
        write_result("scenes_off_policy", result | {"summary": summarize(result["rows"])}, args.out)
    write_result("scenes_off_policy", result | {"summary": summarize(result["rows"])}, args.out)


def row_name(data: str, method: str, seed: int) -> str:
    return f"{data}, {method}, seed {seed}"


def prepare_data(data: str, work: Path, pairs: int) -> str:
    """Name or folder of the training pairs, which are made if they are not there yet."""
    if not DATA[data]:
        return "scenes-pairs"
    folder = work / "data" / f"{data}-{pairs}"
    if not split_file(folder, "train").is_file():
        make_pairs(folder, DATA[data], pairs, 0, seed=11, steps=DRAWING_STEPS)
    return str(folder)


def told(dataset: str, sources: Sequence[str]) -> dict[str, Any]:
    """What there is to say about training pairs."""
    pairs = load_pairs(dataset, "train")
    counts = {name: count for name, count in pairs.counts.items() if count}
    if not sources:
        return {"pictures of": ["scenes-sdxl"], "sampling steps": 20, **counts}
    return {"pictures of": list(sources), "sampling steps": DRAWING_STEPS, **counts}


def settings_of(method: str, seed: int, step: int, dataset: str, folder: Path, args: argparse.Namespace) -> DPOConfig:
    """A run to ``step``, which goes on from its last checkpoint."""
    recipe, options = METHODS[method]
    config = load_recipe(
        recipe,
        **options,
        dataset=dataset,
        seed=seed,
        max_steps=step,
        lr_scheduler_type="constant_with_warmup",
        save_steps=args.every,
        save_total_limit=args.steps // args.every,
        output_dir=str(folder),
        resume_from_checkpoint="latest" if list_checkpoints(folder) else None,
        report_to="none",
        progress=False,
    )
    assert isinstance(config, DPOConfig)
    return config


def point(config: DPOConfig, exam: Exam) -> dict[str, Any]:
    """The trained policy: won, tied or lost on each prompt, mean scores, and what it has cost."""
    step, folder = config.max_steps, Path(config.output_dir)
    checkpoint = folder / f"{PREFIX}{step:08d}"
    if not checkpoint.is_dir():
        raise SystemExit(f"{checkpoint} is not there: give --every as it was, or delete {folder}")
    tuned = exam.take(load_adapter(config.model).load_weights(checkpoint))
    found = {
        "pairs": step * config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "denoiser_calls": denoiser_calls(config),
        "outcomes": outcomes(exam.gains(tuned)),
        "scores": mean_scores(tuned),
    }
    print(f"{folder}, step {step}: {clustered_win_rate([differences(found)])}", flush=True)
    return found


def learned(folder: Path, every: int) -> dict[str, dict[str, float]]:
    """What a run has logged, by the point that ends the steps of which it is the mean."""
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    by_point: dict[int, list[dict[str, float]]] = {}
    for line in lines:
        by_point.setdefault(-(-line["step"] // every) * every, []).append(line)
    return {
        str(step): {name: float(np.mean([line[name] for line in found])) for name in LOGGED}
        for step, found in by_point.items()
    }


def differences(found: Mapping[str, Any]) -> list[float]:
    """1, 0 or -1 for each prompt of a point."""
    return [SCORE[outcome] for outcome in found["outcomes"]]


def summarize(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Curves over all seeds that a point has, and each method's way to DPO's last win rate on the same data."""
    grouped: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for name, row in rows.items():
        data, method, _ = name.split(", ")
        for step, found in row.items():
            grouped.setdefault(data, {}).setdefault(method, {}).setdefault(step, []).append(found)
    summary: dict[str, Any] = {}
    for data, methods in grouped.items():
        curves = {
            method: {step: curve_point(points[step]) for step in sorted(points, key=int)}
            for method, points in methods.items()
        }
        summary[data] = {"curves": curves}
        if "dpo" in methods:
            summary[data]["to_dpo"] = {
                method: way_to(methods["dpo"], methods[method]) for method in methods if method != "dpo"
            }
    return summary


def curve_point(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One step of one method, over seeds."""
    rate = clustered_win_rate([differences(found) for found in seeds])
    return {
        "seeds": len(seeds),
        "win_rate": rate.rate,
        "interval": list(rate.interval),
        "pairs": seeds[0]["pairs"],
        "denoiser_calls": seeds[0]["denoiser_calls"],
        "scores": {name: float(np.mean([found["scores"][name] for found in seeds])) for name in seeds[0]["scores"]},
    }


def way_to(dpo: Mapping[str, list[dict[str, Any]]], other: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """When a method's win rate first is DPO's at DPO's end, and how far it is from it after half of DPO's steps.

    ``half`` is the first point at half of DPO's steps or beyond. ``half_minus_final`` compares prompt by prompt, in win
    rate (a win counts 1, a tie 0.5). ``in_half_the_steps`` is None where no point can say it.
    """
    end = int(max(dpo, key=int))
    final, rates = rates_of(dpo[str(end)]), {int(step): rates_of(points) for step, points in other.items()}
    reached = min((step for step, found in rates.items() if found.mean() >= final.mean()), default=None)
    half = min((step for step in rates if 2 * step >= end), default=None)
    in_half = True if reached is not None and 2 * reached <= end else None if half in (None, reached) else False
    way: dict[str, Any] = {
        "dpo_steps": end,
        "dpo_win_rate": float(final.mean()),
        "reached_at_step": reached,
        "in_half_the_steps": in_half,
    }
    if half is not None:
        gap = paired_difference(rates[half].tolist(), final.tolist())
        way |= {"half": half, "half_minus_final": gap.mean, "interval": list(gap.interval)}
    return way


def rates_of(seeds: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Share of won seeds of each prompt (N,), ties count half."""
    return np.mean([differences(found) for found in seeds], axis=0) / 2 + 0.5
