"""Online methods on the embedded world: win rates over the base by the oracle, and what they cost.

``--methods``: text to image, with DPO and InPO from the same base beside the online ones; ``--trust``: inpaint-rl with
each trust weight. The reward is always a scorer trained on pairs; the oracle only evaluates.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_align.adapters import load_adapter
from diffusion_align.data.inpainting import load_holes
from diffusion_align.demo import held_out_prompts
from diffusion_align.evaluation import clustered_win_rate
from diffusion_align.evaluation.compare import Sampled, SamplingSettings, sample_and_score
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.scenes.holes import SceneHoles
from diffusion_align.training.config import DPOConfig, InPOConfig
from diffusion_align.training.online_config import (
    DRaFTConfig,
    InpaintRLConfig,
    NFTConfig,
    OnlineConfig,
    RAFTConfig,
    RolloutConfig,
)
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_recipe

from .harness import RESULTS, write_result

RECIPES = {name: f"scenes_{name}" for name in ("grpo", "nft", "raft", "draft", "dpo", "inpo")}
TRUSTS = ("none", "prefpaint", "mahalanobis")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scenes-rl", description=__doc__)
    parser.add_argument("--methods", nargs="*", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--trust", nargs="*", choices=TRUSTS, default=list(TRUSTS), help="runs of inpaint-rl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=250)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=RESULTS / "scenes_rl.json")
    args = parser.parse_args(argv)
    prompts = held_out_prompts(args.prompts)
    jobs = {name: (RECIPES[name], {}) for name in args.methods}
    jobs |= {f"inpaint-rl, trust {trust}": ("scenes_inpaint_rl", {"trust": trust}) for trust in args.trust}
    for name, (recipe, options) in jobs.items():
        row = measure(name, recipe, options, prompts, args)
        result = json.loads(args.out.read_text()) if args.out.is_file() else {}  # rows are measured one at a time
        rows = {**result.get("rows", {}), name: {"command_arguments": argv, **row}}
        write_result("scenes_rl", {"prompts": len(prompts), "rows": rows}, args.out)


def measure(
    name: str, recipe: str, options: dict[str, Any], prompts: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Train with every seed and compare with the base on the same held-out prompts (and holes) and noise."""
    oracle = load_scorer("scenes-oracle")
    config = load_recipe(recipe, **options)
    assert isinstance(config, DPOConfig | OnlineConfig)
    reward = config.scorers[0] if isinstance(config, OnlineConfig) else "scenes-vp"  # DPO and InPO: only watched
    proxy = load_scorer(reward)
    adapter, holes, settings = load_adapter(config.model), None, SamplingSettings(guidance_scale=3.5, batch_size=50)
    if isinstance(config, InpaintRLConfig):
        source, every = SceneHoles(len(prompts), seed=2, prompts=prompts), range(len(prompts))
        holes = load_holes(source, every, every, adapter.default_resolution, config.mask_kinds)
        settings = SamplingSettings(config.num_inference_steps, config.guidance_scale, batch_size=50)
    base = sample_and_score(adapter, prompts, oracle, settings, holes)
    base_proxy = proxy_rewards(proxy, base, prompts)
    differences, proxy_gains, seconds, sides = [], [], [], []
    for seed in args.seeds:
        folder = args.work / f"{recipe}-{options.get('trust', 'rl')}-{seed}"
        config = load_recipe(
            recipe, **options, seed=seed, output_dir=str(folder), overwrite_output_dir=True, progress=False
        )
        adapter = load_adapter(config.model)  # type: ignore[attr-defined]
        started = time.perf_counter()
        train(config, adapter)
        seconds.append(time.perf_counter() - started)
        tuned = sample_and_score(adapter, prompts, oracle, settings, holes)
        assert tuned.reward is not None
        assert base.reward is not None
        differences.append((tuned.reward.reward - base.reward.reward).numpy())
        proxy_gains.append(proxy_rewards(proxy, tuned, prompts) - base_proxy)
        sides.append(tuned)
        if holes is not None:
            outside = (holes.masks < 0.5).expand_as(holes.pictures)
            assert bool((tuned.images[outside] == holes.pictures[outside]).all()), "pixels outside the hole changed"
        print(f"{name}, seed {seed}: {np.mean(differences[-1] > 0):.3f} of the prompts better")
    assert isinstance(config, DPOConfig | OnlineConfig)
    per_seed = np.stack(differences)
    rate = clustered_win_rate(differences)
    base_aspects = {} if base.reward is None else base.reward.aspects
    return {
        "reward": reward,
        "seeds": args.seeds,
        "win_rate": rate.to_json(),
        "win_rate_by_seed": [float(((d > 0) + 0.5 * (d == 0)).mean()) for d in differences],
        "oracle_gain": float(per_seed.mean()),
        "oracle_gain_standard_error": float(per_seed.mean(axis=0).std() / len(prompts) ** 0.5),
        "proxy_gain": float(np.mean(proxy_gains)),
        "aspects_gain": {
            aspect: float(np.mean([float((s.reward.aspects[aspect] - before).mean()) for s in sides if s.reward]))
            for aspect, before in base_aspects.items()
        },
        "optimiser_steps": config.max_steps,
        "denoiser_calls": denoiser_calls(config),
        "scored_pictures": scored_pictures(config) if isinstance(config, OnlineConfig) else 0,
        "train_seconds_by_seed": [round(value) for value in seconds],
    }


def proxy_rewards(proxy: RewardScorer, sampled: Sampled, prompts: list[str]) -> float:
    """Mean reward of the scorer that was trained against."""
    return float(proxy.score(sampled.images, prompts).reward.mean())


def scored_pictures(config: OnlineConfig) -> int:
    """Pictures drawn and scored in a run."""
    if isinstance(config, RolloutConfig):
        return config.prompts_per_rollout * config.num_generations * rollouts(config)
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * config.max_steps


def rollouts(config: RolloutConfig) -> int:
    """Rollouts of a run."""
    from diffusion_align.training.online import items_per_rollout

    items = items_per_rollout(config) * getattr(config, "num_iterations", 1)
    return -(-config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps // items)


def denoiser_calls(config: DPOConfig | OnlineConfig) -> int:
    """Evaluations of the denoiser on one picture in a run; a backward pass counts as two more."""
    if isinstance(config, DPOConfig):
        pictures = 2 * config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
        inversion = config.inversion_steps * (1 + config.renoise_iterations) if isinstance(config, InPOConfig) else 0
        return pictures * (3 + 1 + inversion)
    branches = 2 if config.guidance_scale > 1 else 1
    drawn = scored_pictures(config) * config.num_inference_steps * branches
    trained = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    reference = 1 if config.kl_beta else 0
    if isinstance(config, DRaFTConfig):
        return drawn + (2 + reference) * trained * config.gradient_steps * branches
    if isinstance(config, RAFTConfig):
        return drawn + (3 + reference) * trained
    old = 1 if isinstance(config, NFTConfig) else 0
    return drawn + (3 + old + reference) * trained * branches
