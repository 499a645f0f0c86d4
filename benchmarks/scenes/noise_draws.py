"""What fixed noise costs: win rates of DPO with D draws a pair against fresh noise, at equal steps; and what it saves.

The scenes recipe with more steps, three training seeds, held-out prompts, the oracle. Runs with draws remember the
reference's errors. The file is written after every run, and runs that it holds are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_align.adapters import load_adapter
from diffusion_align.commands.demo import run_method
from diffusion_align.evaluation import clustered_win_rate
from diffusion_align.evaluation.compare import Sampled, SamplingSettings, sample_and_score
from diffusion_align.rewards import load_scorer
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.training.engine.checkpoint import list_checkpoints
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.pairs.noising import GaussianNoising
from diffusion_align.training.pairs.remembering import build_reference
from diffusion_align.training.policy.model import prepare_policy
from diffusion_align.training.settings import load_recipe

from ..harness import RESULTS, ratio_interval, read_parts, time_interleaved, write_result

SCORE = {"W": 1.0, "T": 0.0, "L": -1.0}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scenes-noise-draws", description=__doc__)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 8, 4, 2], help="draws of a pair; 0: fresh noise")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timed steps; 0 times none")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/noise-draws"))
    parser.add_argument("--out", type=Path, default=RESULTS / "scenes_noise_draws.json")
    args = parser.parse_args(argv)
    result = read_parts(args.out, ("steps", "prompts", "sampling", "base_scores", "runs", "win_rates", "speed"))
    settings = SamplingSettings()
    wanted = {"steps": args.steps, "prompts": args.prompts, "sampling": settings.to_json()}
    if any(result.get(name, value) != value for name, value in wanted.items()):
        raise SystemExit(f"{args.out} was measured with other --steps or --prompts: give another --out")
    result |= wanted | {"runs": result.get("runs", {})}
    todo = [(seed, draws) for seed in args.seeds for draws in args.draws if run_name(draws, seed) not in result["runs"]]
    if todo:
        prompts, scorer = held_out_prompts(args.prompts), load_scorer("scenes-oracle")
        base = sample_and_score(load_adapter("scenes-sdxl"), prompts, scorer, settings)
        result["base_scores"] = mean_scores(base)
        for seed, draws in todo:
            config = recipe(draws, seed, args.steps, args.work)
            outcome = run_method(config, prompts, base, scorer, settings)
            print(f"{run_name(draws, seed)}: {outcome.win_rate}", flush=True)
            result["runs"][run_name(draws, seed)] = record(config, outcome.sampled, base)
            result["win_rates"] = pooled(result["runs"])
            write_result("scenes_noise_draws", result, args.out)
    if args.rounds:
        result["speed"] = time_steps(recipe(8, 0, args.steps, args.work), args.rounds)
        write_result("scenes_noise_draws", result, args.out)


def run_name(draws: int, seed: int) -> str:
    return f"{f'{draws} draws' if draws else 'fresh'}, seed {seed}"


def recipe(draws: int, seed: int, steps: int, work: Path) -> DPOConfig:
    """The scenes recipe with ``steps`` steps; an interrupted run goes on from its last checkpoint."""
    folder = work / f"{draws or 'fresh'}-{seed}"
    config = load_recipe(
        "scenes_dpo",
        seed=seed,
        max_steps=steps,
        output_dir=str(folder),
        cache_dir=str(work / "cache"),
        noise_draws=draws or None,
        reference_cache=bool(draws),
        resume_from_checkpoint="latest" if list_checkpoints(folder) else None,
        report_to="none",
        progress=False,
    )
    assert isinstance(config, DPOConfig)
    return config


def record(config: DPOConfig, policy: Sampled, base: Sampled) -> dict[str, Any]:
    """One run: won, tied or lost on each prompt, mean scores, and what its log says of speed and remembered rows."""
    assert policy.reward is not None
    assert base.reward is not None
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    found = {
        "outcomes": outcomes((policy.reward.reward - base.reward.reward).numpy()),
        "scores": mean_scores(policy),
        "pairs_per_second": float(np.median([line["samples_per_second"] for line in lines])),
    }
    hits = [line["reference_hits"] for line in lines if "reference_hits" in line]
    return found | ({"reference_hits": float(np.mean(hits))} if hits else {})


def outcomes(gains: np.ndarray) -> str:
    """A letter of ``SCORE`` for each prompt, from the policy's reward minus the base's (N,)."""
    return "".join(next(name for name, score in SCORE.items() if score == sign) for sign in np.sign(gains).tolist())


def mean_scores(sampled: Sampled) -> dict[str, float]:
    assert sampled.reward is not None
    return {name: values.mean().item() for name, values in sampled.reward.aspects.items()}


def pooled(runs: dict[str, Any]) -> dict[str, Any]:
    """Win rate over the base of all seeds together and of each, by the number of draws."""
    by_draws: dict[str, list[list[float]]] = {}
    for name, run in runs.items():
        by_draws.setdefault(name.partition(",")[0], []).append([SCORE[outcome] for outcome in run["outcomes"]])
    return {
        draws: clustered_win_rate(differences).to_json()
        | {"per_seed": [float(np.mean(values)) / 2 + 0.5 for values in differences]}
        for draws, differences in by_draws.items()
    }


def time_steps(config: DPOConfig, rounds: int) -> dict[str, Any]:
    """Pairs per second of one optimiser step on one cached batch, against a reference that is computed each time."""
    adapter = load_adapter(config.model)
    prepare_policy(config, adapter)
    source = build_pair_source(config, adapter)
    batch = next(iter(source))
    parameters = list(adapter.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)

    def step_with(method: PairMethod) -> Callable[[], None]:
        def step() -> None:
            method.loss(batch)[0].backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

        return step

    noising, remembered = GaussianNoising(adapter), build_reference(config, adapter, source)
    ways = {
        "computed": step_with(PairMethod(config, adapter, source, noising)),
        "remembered": step_with(PairMethod(config, adapter, source, noising, reference=remembered)),
    }
    seconds = time_interleaved(ways, rounds)
    return {"pairs": len(batch), "remembered_over_computed": ratio_interval(seconds["computed"], seconds["remembered"])}
