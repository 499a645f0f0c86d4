"""Online methods on the embedded world: win rates over the base by the oracle, and what they cost.

``--methods``: text to image, with DPO, InPO and KTO from the same base beside the online ones; ``--trust``: inpaint-rl
with each trust weight. The reward is always a scorer trained on pairs; the oracle only evaluates. ``--model
scenes-flow`` is the same of a flow model, with its own recipes; ``--pairs`` gives it pairs of its own pictures.

The file is written after each run, and runs that are in it are not done again: seeds may be added, and two processes
may measure different ones at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.data.holes import Holes, load_holes
from diffusion_align.environment import git_commit
from diffusion_align.evaluation import clustered_win_rate
from diffusion_align.evaluation.compare import Sampled, SamplingSettings, sample_and_score
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.scenes.world.render import IMAGE_SIZE
from diffusion_align.scenes.world.scene_holes import SceneHoles
from diffusion_align.training.online.config import InpaintRLConfig, OnlineConfig, RolloutConfig
from diffusion_align.training.pairs.beyond_pairs.config import KTOConfig
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_recipe

from ..harness import RESULTS, change_result, folder_name, in_order, read_parts

ON_PAIRS = ("dpo", "inpo", "kto")
METHODS = ("grpo", "nft", "raft", "draft", "online-dpo", *ON_PAIRS)
#: Settings of what is measured here.
Measured = DPOConfig | KTOConfig | OnlineConfig
TRUSTS = ("none", "prefpaint", "mahalanobis")
PARTS = ("prompts", "rows")


@dataclass(frozen=True)
class Base:
    """A model that methods start from.

    Attributes:
        recipes: how the names of its recipes begin.
        guidance_scale: what it draws best with (``base-quality``).
        out: the name of the file with what was measured.
        trusts: whether inpaint-rl is measured beside.
    """

    recipes: str
    guidance_scale: float
    out: str
    trusts: bool = False


BASES = {
    "scenes-sdxl": Base("scenes", 3.5, "scenes_rl", trusts=True),
    "scenes-flow": Base("scenes_flow", 5.5, "scenes_flow"),
}


def recipe_of(base: Base, method: str) -> str:
    """Name of the recipe that trains the base by the method."""
    return f"{base.recipes}_{method.replace('-', '_')}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scenes-rl", description=__doc__)
    parser.add_argument("--model", choices=tuple(BASES), default="scenes-sdxl")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--trust", nargs="*", choices=TRUSTS, default=None, help="runs of inpaint-rl, of scenes-sdxl")
    parser.add_argument("--pairs", default=None, help="what methods of pairs learn from; unset: the recipe's data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=250)
    parser.add_argument("--draws", type=int, default=1, help="pictures of each prompt, of as many noises")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=None, help="unset: a file of the model's")
    args = parser.parse_args(argv)
    base = BASES[args.model]
    if args.trust and not base.trusts:
        parser.error(f"--trust measures an inpainting model beside scenes-sdxl; leave it out with --model {args.model}")
    trusts = args.trust if args.trust is not None else TRUSTS if base.trusts else ()
    out: Path = args.out or RESULTS / f"{base.out}.json"
    prompts = held_out_prompts(args.prompts) * args.draws
    jobs: dict[str, tuple[str, dict[str, Any]]] = {
        name: (recipe_of(base, name), {"dataset": args.pairs} if args.pairs and name in ON_PAIRS else {})
        for name in args.methods
    }
    jobs |= {f"inpaint-rl, trust {trust}": ("scenes_inpaint_rl", {"trust": trust}) for trust in trusts}
    exams: dict[str, dict[str, Exam]] = {}  # by model: a base's pictures are drawn once for all of its rows
    for name, (recipe, options) in jobs.items():
        config = load_recipe(recipe, **options)
        assert isinstance(config, Measured)
        for seed in args.seeds:
            if str(seed) in runs_of(read_parts(out, PARTS), name, config, args):
                print(f"{name}, seed {seed}: is in {out}", flush=True)
                continue
            if config.model not in exams:
                exams[config.model] = prepare_exams(config, prompts, base.guidance_scale)
            run = measure(name, replace(config, seed=seed), exams[config.model], args)
            change_result(out, PARTS, lambda kept: with_run(kept, name, config, seed, run, args))  # noqa: B023
            better = np.mean(as_numbers(run["gains"]["own"]) > 0)
            print(f"{name}, seed {seed}: {better:.3f} of the pictures better", flush=True)


def runs_of(kept: Mapping[str, Any], name: str, config: Measured, args: argparse.Namespace) -> dict[str, Any]:
    """The file's runs of a row by seed, if they have these settings, prompts and draws."""
    row = kept.get("rows", {}).get(name, {})
    found = (kept.get("prompts"), row.get("draws"), row.get("settings"))
    return dict(row["by_seed"]) if found == (args.prompts, args.draws, settings_beside(type(config)(), config)) else {}


def settings_beside(plain: TrainConfig, config: TrainConfig) -> dict[str, Any]:
    """What tells a run from one with the settings ``plain``, but for its seed and where it is written.

    A data set goes by its name, wherever it lies.
    """
    ours = {name: value for name, value in vars(config).items() if name not in ("output_dir", "seed")}
    ours["dataset"] = Path(config.dataset).name
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in ours.items()
        if value != getattr(plain, name, None)
    }


@dataclass(frozen=True)
class Exam:
    """Held-out prompts (and holes), how pictures are drawn for them, and the base model's."""

    prompts: list[str]
    holes: Holes | None
    settings: SamplingSettings
    base: Sampled

    @classmethod
    def prepare(cls, adapter: Adapter, prompts: list[str], holes: Holes | None, settings: SamplingSettings) -> Exam:
        base = sample_and_score(adapter, prompts, load_scorer("scenes-oracle"), settings, holes)
        return cls(prompts, holes, settings, base)

    def take(self, adapter: Adapter) -> Sampled:
        """The same prompts, holes and noise with the present policy; nothing outside the holes may change."""
        tuned = sample_and_score(adapter, self.prompts, load_scorer("scenes-oracle"), self.settings, self.holes)
        if self.holes is not None:
            outside = (self.holes.masks < 0.5).expand_as(self.holes.pictures)
            assert bool((tuned.images[outside] == self.holes.pictures[outside]).all()), "pixels outside changed"
        return tuned

    def gains(self, tuned: Sampled, aspect: str | None = None) -> np.ndarray:
        """Oracle score (or an aspect of it) of every picture minus the base's (N,)."""
        assert tuned.reward is not None
        assert self.base.reward is not None
        pair = [side.reward if aspect is None else side.aspects[aspect] for side in (tuned.reward, self.base.reward)]
        return (pair[0] - pair[1]).numpy()


def prepare_exams(config: Measured, prompts: list[str], scale: float) -> dict[str, Exam]:
    """The comparison that counts, "own", and for inpainting others: holes and a sampler that were not trained on."""
    adapter = load_adapter(config.model)
    if not isinstance(config, InpaintRLConfig):
        return {"own": Exam.prepare(adapter, prompts, None, SamplingSettings(guidance_scale=scale, batch_size=50))}
    source, every = SceneHoles(len(prompts), seed=2, prompts=prompts), range(len(prompts))
    rollouts = SamplingSettings(config.num_inference_steps, config.guidance_scale, batch_size=50)
    wanted = {
        "own": (config.mask_kinds, rollouts),
        "box": (("box",), rollouts),
        "brush": (("brush",), rollouts),
        "20 steps, guidance 3.5": (config.mask_kinds, SamplingSettings(20, 3.5, batch_size=50)),
    }
    return {
        name: Exam.prepare(adapter, prompts, load_holes(source, every, every, IMAGE_SIZE, kinds), settings)
        for name, (kinds, settings) in wanted.items()
    }


def measure(name: str, config: Measured, exams: Mapping[str, Exam], args: argparse.Namespace) -> dict[str, Any]:
    """One run: train, and compare with the base on the same held-out prompts (and holes) and noise."""
    folder = args.work / args.model / f"{folder_name(name)}-{config.seed}"
    adapter, started = load_adapter(config.model), time.perf_counter()
    train(replace(config, output_dir=str(folder), overwrite_output_dir=True, progress=False), adapter)
    seconds = time.perf_counter() - started
    own = exams["own"]
    taken = {label: exam.take(adapter) for label, exam in exams.items()}
    proxy = load_scorer(reward_of(config))
    assert own.base.reward is not None
    return {
        "gains": {label: as_texts(exam.gains(taken[label]), args.draws) for label, exam in exams.items()},
        "proxy_gain": proxy_rewards(proxy, taken["own"], own.prompts) - proxy_rewards(proxy, own.base, own.prompts),
        "aspects_gain": {name: float(own.gains(taken["own"], name).mean()) for name in own.base.reward.aspects},
        "train_seconds": round(seconds),
        "git_commit": git_commit(),
    }


def as_texts(gains: np.ndarray, draws: int) -> list[str]:
    """Gains of all pictures as one line of numbers for each draw: a list of numbers would fill a page."""
    return [" ".join(f"{gain:.4f}" for gain in each) for each in gains.reshape(draws, -1)]


def as_numbers(texts: Sequence[str]) -> np.ndarray:
    """Undo ``as_texts``: (draws, prompts)."""
    return np.array([text.split() for text in texts], dtype=float)


def with_run(
    kept: Mapping[str, Any], name: str, config: Measured, seed: int, run: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """The file's content with one more run; a row of other settings is begun anew, and so are all of other prompts."""
    rows = kept.get("rows", {}) if kept.get("prompts") == args.prompts else {}
    by_seed = in_order({**runs_of(kept, name, config, args), str(seed): run})
    runs = list(by_seed.values())
    elsewhere = [label for label in run["gains"] if label != "own"]
    row = {
        "settings": settings_beside(type(config)(), config),
        "reward": reward_of(config),
        "seeds": [int(each) for each in by_seed],
        "draws": args.draws,
        **compared([as_numbers(each["gains"]["own"]) for each in runs]),
        "proxy_gain": fmean(each["proxy_gain"] for each in runs),
        "aspects_gain": {
            aspect: fmean(each["aspects_gain"][aspect] for each in runs) for aspect in run["aspects_gain"]
        },
        "elsewhere": {label: compared([as_numbers(each["gains"][label]) for each in runs]) for label in elsewhere},
        "optimiser_steps": config.max_steps,
        "denoiser_calls": denoiser_calls(config),
        "scored_pictures": scored_pictures(config) if isinstance(config, OnlineConfig) else 0,
        "by_seed": by_seed,
    }
    return {"prompts": args.prompts, "rows": {**rows, name: row}}


def compared(by_seed: Sequence[np.ndarray]) -> dict[str, Any]:
    """Win rate over the base and mean gain by the oracle, of gains (draws, prompts) for each seed.

    All pictures of a prompt are one observation of it.
    """
    gains = np.stack(by_seed)  # (seeds, draws, prompts)
    by_prompt = gains.mean(axis=(0, 1))
    return {
        "win_rate": clustered_win_rate(list(gains.reshape(-1, len(by_prompt)))).to_json(),
        "win_rate_by_seed": [float(((gain > 0) + 0.5 * (gain == 0)).mean()) for gain in gains],
        "oracle_gain": float(by_prompt.mean()),
        "oracle_gain_standard_error": float(by_prompt.std() / len(by_prompt) ** 0.5),
        "oracle_gain_by_seed": [float(gain.mean()) for gain in gains],
    }


def reward_of(config: Measured) -> str:
    """The scorer that a run learns from; of methods on pairs, one that is only watched."""
    return config.scorers[0] if isinstance(config, OnlineConfig) else "scenes-vp"


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
    items = config.items_per_rollout() * getattr(config, "num_iterations", 1)
    return -(-config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps // items)


def denoiser_calls(config: TrainConfig) -> int:
    """Evaluations of the denoiser on one picture in a run; a backward pass counts as two more."""
    work = config.work()
    examples = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    return round(examples * (3 * work.trained + sum(work.forward.values())))
