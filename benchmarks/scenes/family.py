"""Preference methods on the embedded world: the same verdicts, at equal pairs seen and at equal denoiser calls.

Each row has DPO's recipe and what its method needs (``ROWS``). Methods whose steps cost more or less than DPO's have a
second row, "NAME, equal calls", with as many steps as DPO's denoiser calls pay for. Figures are of held-out prompts, by
the oracle, one picture each for the win rate, the base's noise for both sides; drift is that of held-out pairs. Pairs
are two pictures: methods on lists see half as many lists of four, methods on thumbs twice as many pictures.

    python -m benchmarks scenes-family --seeds 0 1 2

The file is written after each run, and runs that are in it are not done again. Two processes may measure different
seeds or methods at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.evaluation.compare import SamplingSettings
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.pairs.job import drawn_noise
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.pairs.remembering import batch_reference
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_recipe

from ..harness import RESULTS, change_result, folder_name, in_order, read_parts
from .online_methods import denoiser_calls, settings_beside
from .panel import Panel, over_seeds
from .ranked_lists import PICTURES, make_lists
from .thumbs import make_thumbs

#: What is read off held-out pairs, and off the last quarter of a run's own log where it has it.
DRIFT = ("chosen_error_up", "error_chosen", "error_rejected", "kappa", "moved", "implicit_accuracy")
PARTS = ("prompts", "sampling", "base", "rows")
#: SmPO and CaPO need to know by how much a picture is better: the scorer that was trained on the same verdicts says.
SOFT = {"relabel_with": "scenes-vp", "relabel_temperature": 1.0}


@dataclass(frozen=True)
class Row:
    """A recipe, what is changed in it, and what it learns from: pairs, lists (``ranked_lists``) or ``thumbs``."""

    recipe: str = "scenes_dpo"
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Literal["pairs", "lists", "thumbs"] = "pairs"

    def config(self, steps: int | None, work: Path) -> TrainConfig:
        """Its settings, for another number of steps if one is given; a step has equally many pictures."""
        given: dict[str, Any] = {} if steps is None else {"max_steps": steps}
        if self.data != "pairs":
            pictures = 2 * load_recipe(self.recipe).per_device_train_batch_size
            each = PICTURES if self.data == "lists" else 1
            given |= {"dataset": str(work / self.data), "per_device_train_batch_size": pictures // each}
        if self.data == "lists":
            given["list_size"] = PICTURES
        config = load_recipe(self.recipe, **{**self.options, **given})
        assert isinstance(config, TrainConfig)
        return config


def loss(name: str, data: Literal["pairs", "lists"] = "pairs", **options: Any) -> Row:
    """DPO's recipe with another loss."""
    return Row(options={"loss_type": name, **options}, data=data)


ROWS = {
    "dpo": Row(),
    "safeguard-0.8": Row(options={"safeguard_mu": 0.8}),
    "safeguard-0.9": Row(options={"safeguard_mu": 0.9}),
    "safeguard-0.95": Row(options={"safeguard_mu": 0.95}),
    "linear": loss("linear"),
    "linear-ema": loss("linear", reference="ema", watch_frozen=False),
    "dpo-soft": Row(options=SOFT),
    "smpo": Row(options={**SOFT, "pair_beta": 10.0, "beta": 100.0}),
    "ipo": loss("ipo"),
    "lair": loss("lair"),
    "lair-lists": loss("lair", "lists"),
    "plackett-luce": loss("plackett_luce", "lists"),
    "dgpo": loss("dgpo", "lists"),
    "rankdpo": loss("rankdpo", "lists"),
    "d2o": loss("d2o", "lists"),
    "robust": loss("robust", label_smoothing=0.1),
    "hinge": loss("hinge"),
    "kto-pair": loss("kto"),
    "bco-pair": loss("bco_pair"),
    "sppo-hard": loss("sppo_hard"),
    "exo-pair": loss("exo_pair", label_smoothing=0.1),
    "apo-zero": loss("apo_zero"),
    "apo-down": loss("apo_down"),
    "dmpo": loss("dmpo"),
    "nca-pair": loss("nca_pair"),
    "aot": loss("aot"),
    "aot-unpaired": loss("aot_unpaired"),
    "asft": loss("asft", beta=10.0),  # errors are about 0.015: of the recipe's 1000 the second term would vanish
    "mapo": loss("mapo", beta=0.1),
    "kto": Row("scenes_kto", data="thumbs"),
    "kto-own-noise": Row("scenes_kto", {"shared_noise": False, "learning_rate": 3e-4}, "thumbs"),
    "bco": Row("scenes_kto", {"loss_type": "bco"}, "thumbs"),
    "inpo": Row("scenes_inpo"),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scenes-family", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--budgets", nargs="+", choices=("pairs", "calls"), default=["pairs", "calls"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps of DPO; unset: its recipe's")
    parser.add_argument("--prompts", type=int, default=250, help="held-out prompts")
    parser.add_argument("--diverse", type=int, default=64, help="of these, how many are drawn four times more")
    parser.add_argument("--lists", type=int, default=500, help="lists of four pictures, for methods on lists")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/family"))
    parser.add_argument("--out", type=Path, default=RESULTS / "scenes_family.json")
    args = parser.parse_args(argv)
    kinds = {ROWS[name].data for name in args.methods}
    if "lists" in kinds:
        make_lists(load_adapter("scenes-sdxl"), args.work / "lists", args.lists)
    if "thumbs" in kinds:
        make_thumbs(args.work / "thumbs")
    runs = planned(args.methods, args.budgets, args.steps, args.work)
    settings = SamplingSettings(guidance_scale=3.5, batch_size=50)
    prompts = held_out_prompts(args.prompts)
    panel = Panel.prepare(load_adapter("scenes-sdxl"), prompts, args.diverse, settings)
    common = {"prompts": len(prompts), "sampling": settings.to_json(), "base": panel.base}
    for seed in args.seeds:
        for name, config in runs.items():
            if is_measured(args.out, common, name, config, seed):
                print(f"{name}, seed {seed}: is in {args.out}", flush=True)
                continue
            measured = measure(name, config, seed, panel, args.work)
            change_result(args.out, PARTS, lambda kept: with_run(kept, common, name, config, seed, measured))  # noqa: B023
            print(f"{name}, seed {seed}: {told(measured)}", flush=True)


def planned(methods: list[str], budgets: list[str], steps: int | None, work: Path) -> dict[str, TrainConfig]:
    """The rows: DPO's steps for all, and as many as its denoiser calls pay for where that is another number."""
    base, found = ROWS["dpo"].config(steps, work), {}
    for name in methods:
        config = ROWS[name].config(base.max_steps, work)
        if "pairs" in budgets:
            found[name] = config
        paid = max(1, round(base.max_steps * denoiser_calls(base) / denoiser_calls(config)))
        if "calls" in budgets and paid != config.max_steps:
            found[f"{name}, equal calls"] = ROWS[name].config(paid, work)
    return found


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What tells a row from DPO's recipe."""
    plain = load_recipe("scenes_dpo")
    assert isinstance(plain, TrainConfig)
    return {"method": config.method, **settings_beside(plain, config)}


def is_measured(out: Path, common: Mapping[str, Any], name: str, config: TrainConfig, seed: int) -> bool:
    """Whether the file has this run, with these settings and prompts."""
    kept = read_parts(out, PARTS)
    row = kept.get("rows", {}).get(name, {})
    same = kept.get("prompts") == common["prompts"] and row.get("settings") == settings_of(config)
    return same and str(seed) in row["by_seed"]


def measure(name: str, config: TrainConfig, seed: int, panel: Panel, work: Path) -> dict[str, Any]:
    """Train with one seed, and look at the policy."""
    run = replace(
        config,
        seed=seed,
        output_dir=str(work / f"{folder_name(name)}-{seed}"),
        overwrite_output_dir=True,
        progress=False,
        report_to="none",
    )
    adapter, started = load_adapter(run.model), time.perf_counter()
    result = train(run, adapter)
    seconds = round(time.perf_counter() - started)
    return {
        **panel.take(adapter).to_json(),
        "held_out_pairs": drift(adapter),
        "in_training": last_of(result.history),
        "train_seconds": seconds,
    }


@torch.no_grad()
def drift(adapter: Adapter, batches: int = 10) -> dict[str, float]:
    """How far the policy has moved on held-out pairs, at the recipe's noise levels: the same ones for every method.

    ``chosen_error_up`` is the share of pairs whose chosen picture is predicted worse than by the base; ``moved`` the
    mean squared distance of both predictions, which the divergence of a reverse step is proportional to.
    """
    config = load_recipe("scenes_dpo", dataset_split="test")
    assert isinstance(config, DPOConfig)
    source = build_pair_source(config, adapter)
    method = PairMethod(
        config, adapter, source, drawn_noise(config, adapter), reference=batch_reference(config, adapter)
    )
    pairs = method.batches()
    found = [method.loss(next(pairs))[1] for _ in range(batches)]
    return {name: fmean(float(each[name]) for each in found) for name in DRIFT}


def last_of(history: list[dict[str, float]]) -> dict[str, float]:
    """Means over the last quarter of a run's log, against the base where its reference moves."""
    lines = [line for line in history if "loss" in line]
    late = lines[-max(1, len(lines) // 4) :]
    found = {}
    for name in DRIFT:
        key = f"frozen/{name}" if f"frozen/{name}" in late[-1] else name
        if key in late[-1]:
            found[name] = fmean(line[key] for line in late)
    return found


def with_run(
    kept: dict[str, Any],
    common: Mapping[str, Any],
    name: str,
    config: TrainConfig,
    seed: int,
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """The file's content with one more run; rows of other settings, and all rows of other prompts, are begun anew."""
    rows = kept.get("rows", {}) if kept.get("prompts") == common["prompts"] else {}
    before = rows.get(name, {})
    runs = before["by_seed"] if before.get("settings") == settings_of(config) else {}
    by_seed = in_order({**runs, str(seed): measured})
    examples = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    row = {
        "settings": settings_of(config),
        **over_seeds(by_seed, common["base"]),
        **{part: means(by_seed, part) for part in ("held_out_pairs", "in_training")},
        "optimiser_steps": config.max_steps,
        "pairs_seen": round(examples * config.work().trained / 2),
        "denoiser_calls": denoiser_calls(config),
        "by_seed": by_seed,
    }
    return {**common, "rows": {**rows, name: row}}


def means(by_seed: Mapping[str, Mapping[str, Any]], part: str) -> dict[str, float]:
    """Of each figure the mean over the seeds that have it."""
    names = dict.fromkeys(name for each in by_seed.values() for name in each[part])
    return {name: fmean(each[part][name] for each in by_seed.values() if name in each[part]) for name in names}


def told(measured: Mapping[str, Any]) -> str:
    """One run in a line."""
    letters, pairs = measured["verdicts"], measured["held_out_pairs"]
    rate = (letters.count("w") + 0.5 * letters.count("t")) / len(letters)
    return (
        f"win rate {rate:.3f}, prompt-following {measured['aspects']['prompt_following']:.3f}, "
        f"chosen error up {pairs['chosen_error_up']:.2f}, alarms {', '.join(measured['alarms']) or 'none'}"
    )
