"""Whole training runs against diffusers' research script ``train_diffusion_dpo_sdxl.py`` itself.

The script is not part of this repository: take it from diffusers, ``examples/research_projects/diffusion_dpo``, and
name it with ``--script``. It runs unchanged in a process of its own; where wandb is not installed, an empty module
stands in for what it imports and does not use. It trains ``scenes-sdxl`` on the very files of ``scenes-pairs``, whose
columns it reads, all 1,000 rows: the 111 ties it takes for wins of their first picture; we drop them.

Part ``speed``: processes take turns, the same settings on both sides (LoRA rank 8 of the attention projections,
float32, batches of 16 pairs of 64 pixels, no flips). Seconds of the loop are from its progress bar's birth to the last
step's end, those of the process from its start to its end; memory is its peak. A variant with a cache runs once before,
untimed.

Part ``quality``: the script trains as long as our recipe ``scenes_dpo`` and with its settings, where it has them, and
is compared with the base as ``scenes-dpo-inpo`` compares ours.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml

from diffusion_align.adapters import load_adapter, shipped_path
from diffusion_align.evaluation import clustered_win_rate
from diffusion_align.evaluation.compare import SamplingSettings, compare, sample_and_score
from diffusion_align.rewards import load_scorer
from diffusion_align.scenes.held_out import held_out_prompts

from ..harness import RESULTS, ratio_interval, read_parts, write_result
from .timed_process import STAND_INS, Timing, run_timed

#: Our ways of training, by the settings that differ; paths of caches are below ``--work``.
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "uncached": {},
        "cached": {"cache_dir": "cache"},
        "remembered": {"cache_dir": "cache", "noise_draws": 8, "reference_cache": True},
    }
)
PARTS = ("speed", "quality")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks dpo-script", description=__doc__)
    parser.add_argument("--script", type=Path, required=True, help="diffusers' train_diffusion_dpo_sdxl.py")
    parser.add_argument("--part", choices=PARTS, default="speed")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="speed: ours")
    parser.add_argument("--rounds", type=int, default=5, help="speed: runs of each variant")
    parser.add_argument("--steps", type=int, default=60, help="speed: steps of a run")
    parser.add_argument("--threads", type=int, default=2, help="threads of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="quality: training seeds")
    parser.add_argument("--prompts", type=int, default=250, help="quality: held-out prompts")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/dpo-script"))
    parser.add_argument("--out", type=Path, default=RESULTS / "dpo_script_scenes_sdxl.json")
    args = parser.parse_args(argv)
    if not args.script.is_file():
        parser.error(f"--script {args.script}: no such file")
    result = read_parts(args.out, PARTS)
    if args.part == "speed":
        for speed in measure_speed(args):
            write_result("dpo_script_scenes_sdxl", {**result, "speed": speed}, args.out)
    else:
        write_result("dpo_script_scenes_sdxl", {**result, "quality": measure_quality(args)}, args.out)


# -- speed -------------------------------------------------------------------------------------------------------------


def measure_speed(args: argparse.Namespace) -> Any:
    """The figures after each round from the second on: a long benchmark may not live to its end."""
    work: Path = args.work
    runs: dict[str, list[Timing]] = {name: [] for name in ("script", *args.variants)}
    prepared = {name: run_ours(args, name) for name in args.variants if "cache_dir" in VARIANTS[name]}
    for number in range(args.rounds):
        for name in runs:
            timing = run_script(args, work / "script") if name == "script" else run_ours(args, name)
            runs[name].append(timing)
            print(f"round {number + 1}, {name}: {timing}", flush=True)
        if number:
            yield {
                "model": "scenes-sdxl",
                "pairs_per_step": 16,
                "steps": args.steps,
                "threads": args.threads,
                "dtype": "float32",
                "script": script_facts(args.script),
                "variants": {name: ratios(name, runs, prepared.get(name)) for name in args.variants},
            }


def ratios(name: str, runs: Mapping[str, list[Timing]], preparation: Timing | None) -> dict[str, Any]:
    """How many times as fast as the script, and with how much of its memory."""
    script, ours = runs["script"], runs[name]
    memory = [float(np.median([run.peak_memory for run in side])) for side in (ours, script)]
    found: dict[str, Any] = {
        "settings": dict(VARIANTS[name]),
        "loop": ratio_interval([r.loop_seconds for r in script], [r.loop_seconds for r in ours]),
        "process": ratio_interval([r.process_seconds for r in script], [r.process_seconds for r in ours]),
        "peak_memory_over_script": memory[0] / memory[1],
    }
    if preparation is not None:
        whole = float(np.median([run.process_seconds for run in script]))
        found["first_run_process_over_script"] = preparation.process_seconds / whole
    return found


def run_ours(args: argparse.Namespace, variant: str) -> Timing:
    """One run of ``diffusion-align train dpo``."""
    work: Path = args.work / variant
    settings = {
        "method": "dpo",
        "model": "scenes-sdxl",
        "dataset": "scenes-pairs",
        "output_dir": str(work / "run"),
        "overwrite_output_dir": True,
        "max_steps": args.steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-5,
        "lora_rank": 8,
        "beta": 5000.0,
        "random_flip": False,
        **VARIANTS[variant],
    }
    if "cache_dir" in settings:
        settings["cache_dir"] = str(args.work / settings["cache_dir"])
    work.mkdir(parents=True, exist_ok=True)
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return run_timed(
        "diffusion_align.cli", ["train", "dpo", "--config", str(recipe)], args.steps, work, environment(args)
    )


def run_script(args: argparse.Namespace, work: Path, **options: Any) -> Timing:
    """One run of the script; ``options`` are its own, beside those of the speed part and in their place."""
    settings = {
        "pretrained_model_name_or_path": shipped_path("scenes-sdxl"),
        "dataset_name": shipped_path("scenes-pairs"),
        "dataset_split_name": "train",
        "cache_dir": args.work / "datasets",
        "output_dir": work / "run",
        "max_train_steps": args.steps,
        "train_batch_size": 16,
        "resolution": 64,
        "learning_rate": 1e-5,
        "lr_warmup_steps": 0,
        "rank": 8,
        "beta_dpo": 5000,
        "seed": 0,
        **options,
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    steps = int(settings["max_train_steps"])
    return run_timed(str(args.script), [*arguments, "--no_hflip"], steps, work, environment(args))


def environment(args: argparse.Namespace) -> dict[str, str]:
    """What both sides' processes get: threads, and nothing from the network."""
    return {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}


def script_facts(script: Path) -> dict[str, Any]:
    """Which script it was, and what was done to run it."""
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    return {"name": script.name, "sha256": digest, "empty_modules_if_not_installed": list(STAND_INS)}


# -- quality -----------------------------------------------------------------------------------------------------------


def measure_quality(args: argparse.Namespace) -> dict[str, Any]:
    """Win rates of the script's LoRAs over the base; what was trained before, below ``--work``, is read again."""
    prompts, scorer, settings = held_out_prompts(args.prompts), load_scorer("scenes-oracle"), SamplingSettings()
    trained = [train_script(args, seed) for seed in args.seeds]
    base = sample_and_score(load_adapter("scenes-sdxl"), prompts, scorer, settings)
    assert base.reward is not None
    differences, rates, aspects = [], [], []
    for seed, folder in zip(args.seeds, trained, strict=True):
        sampled = sample_and_score(load_adapter("scenes-sdxl").load_weights(folder), prompts, scorer, settings)
        assert sampled.reward is not None
        rates.append(compare(sampled, base))
        print(f"script, seed {seed}: {rates[-1]}", flush=True)
        differences.append((sampled.reward.reward - base.reward.reward).tolist())
        aspects.append({name: values.mean().item() for name, values in sampled.reward.aspects.items()})
    scores = {
        name: {"base": values.mean().item(), "policy": float(np.mean([found[name] for found in aspects]))}
        for name, values in base.reward.aspects.items()
    }
    return {
        "prompts": len(prompts),
        "seeds": args.seeds,
        "sampling": settings.to_json(),
        "script": script_facts(args.script),
        "settings": dict(QUALITY),
        "win_rate": clustered_win_rate(differences).to_json(),
        "per_seed": [rate.to_json() for rate in rates],
        "scores": scores,
    }


#: The recipe ``scenes_dpo`` in the script's words; it has none for other LoRA targets and for the smallest timestep.
QUALITY: Mapping[str, Any] = MappingProxyType(
    {
        "max_train_steps": 100,
        "train_batch_size": 24,
        "rank": 16,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 10,
        "adam_weight_decay": 0.0,
        "beta_dpo": 1000,
    }
)


def train_script(args: argparse.Namespace, seed: int) -> Path:
    """The folder of the script's LoRA, trained with ``seed`` unless it is there."""
    work = args.work / f"quality-{seed}"
    if not (work / "run" / "pytorch_lora_weights.safetensors").is_file():
        run_script(args, work, **QUALITY, seed=seed)
    return work / "run"
