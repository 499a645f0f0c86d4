"""Online preference learning on the embedded world, round by round, and what its upper bounds are.

``train online-dpo`` learns from a scorer that was trained on verdicts (``--judge``); the oracle only evaluates, on
held-out prompts, after every ``--every`` rounds. Beside it: the same loop with the oracle as judge, and best-of-n of
the base by judge and by oracle, which say what holds it back; and the methods that ``scenes-rl`` measured, read from
its file.

    python -m benchmarks scenes-online --judge scenes-vp-words --seeds 0

The file is written after every policy that was looked at, and a killed run goes on from its last checkpoint. Two
processes may measure different seeds at once, and further seeds are merged. Runs of other settings need another
``--work``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_align.adapters import load_adapter
from diffusion_align.evaluation import clustered_win_rate
from diffusion_align.evaluation.compare import SamplingSettings, sample_and_score
from diffusion_align.rewards import load_scorer
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.training.engine.checkpoint import list_checkpoints
from diffusion_align.training.online.preference.config import OnlineDPOConfig
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_config, load_recipe, to_dict

from ..harness import RESULTS, change_result, in_order, read_parts
from .flawless import WAYS, taught
from .panel import ASPECTS, Outcome, Panel, as_gains, over_seeds, verdicts

PARTS = ("prompts", "sampling", "summary", "base", "runs", "best_of_n", "flawless", "others")
#: Pictures of a prompt, of which the best by a scorer is taken.
CHOSEN_FROM = (1, 4, 8)
#: Pictures of best-of-n have seeds of their own: with n = 1 they win against the base's half of the time.
OTHER_SEEDS = 50_000
#: What ``scenes-rl`` measured with the same prompts and the same sampling.
OTHERS = ("grpo", "nft", "raft", "dpo")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scenes-online", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--judge", nargs="+", default=["scenes-vp-words"], help="scorers that the policy learns from")
    parser.add_argument("--recipe", default="scenes_online_dpo", help="shipped recipe, or a YAML file")
    parser.add_argument("--parts", nargs="+", choices=("judge", "oracle", "best-of-n", "flawless"), default=None,
                        help="what to measure; unset: all of it")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps; unset: the recipe's")
    parser.add_argument("--every", type=int, default=1, help="rounds between looks at the policy")
    parser.add_argument("--prompts", type=int, default=250, help="held-out prompts")
    parser.add_argument("--diverse", type=int, default=64, help="of these, how many are drawn four times more")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/online"))
    parser.add_argument("--out", type=Path, default=RESULTS / "scenes_online.json")
    args = parser.parse_args(argv)
    parts = args.parts or ["judge", "oracle", "best-of-n", "flawless"]
    settings = SamplingSettings(guidance_scale=3.5, batch_size=50)
    config = settings_of(args.recipe, args.judge, args.steps, args.every)
    prompts = held_out_prompts(args.prompts)
    panel = Panel.prepare(load_adapter(config.model), prompts, args.diverse, settings)
    common = {"prompts": len(prompts), "sampling": settings.to_json(), "base": panel.base, "others": others()}
    kept = with_prompts(read_parts(args.out, PARTS), common)
    if "best-of-n" in parts and "+".join(config.scorers) not in kept.get("best_of_n", {}):
        rows = best_of_n(config, panel)
        change_result(args.out, PARTS, lambda kept: {**with_prompts(kept, common), "best_of_n": rows})
    for seed in args.seeds:
        for part in [part for part in parts if part in ("judge", "oracle")]:
            judged_by_oracle = {"scorers": ("scenes-oracle",), "standardise": "running"}  # nothing to standardise
            own = config if part == "judge" else replace(config, **judged_by_oracle)
            curve(replace(own, seed=seed), panel, common, args, part == "judge")
    if "flawless" in parts:
        teach(config, panel, common, args)


def teach(config: OnlineDPOConfig, panel: Panel, common: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Measure what of ``flawless`` is not in the file yet, for as many calls as the loop's run that is in it."""
    run = read_parts(args.out, PARTS).get("runs", {}).get("+".join(config.scorers))
    if run is None:
        raise SystemExit(f"{args.out}: part flawless has as many denoiser calls as the loop: measure part judge first")
    calls = round(list(run["curve"].values())[-1]["denoiser_calls"])
    for name in WAYS:
        if name in read_parts(args.out, PARTS).get("flawless", {}):
            continue
        row = taught(calls, panel, args.work, name)

        def with_row(kept: dict[str, Any], name: str = name, row: dict[str, Any] = row) -> dict[str, Any]:
            return {**with_prompts(kept, common), "flawless": {**kept.get("flawless", {}), name: row}}

        change_result(args.out, PARTS, with_row)
        print(f"flawless pictures, {name}: prompt-following {row['aspects']['prompt_following']:.3f}", flush=True)


def settings_of(recipe: str, judge: list[str], steps: int | None, every: int) -> OnlineDPOConfig:
    """The recipe with this judge, and with a checkpoint, which holds weights, wherever the policy is looked at."""
    given: dict[str, Any] = {"scorers": tuple(judge), "save_total_limit": 10_000, "eval_steps": 0, "eval_rounds": 0}
    if steps is not None:
        given["max_steps"] = steps
    given |= {"progress": False, "report_to": "none"}
    if recipe.endswith((".yaml", ".yml")):
        config = replace(load_config(OnlineDPOConfig, recipe), **given)
    else:
        config = load_recipe(recipe, **given)
    assert isinstance(config, OnlineDPOConfig)
    items = config.items_per_rollout() * config.num_iterations
    return replace(config, save_steps=every * -(-items // (config.own * config.gradient_accumulation_steps)))


def curve(
    config: OnlineDPOConfig, panel: Panel, common: Mapping[str, Any], args: argparse.Namespace, main: bool
) -> None:
    """Train with one seed, or go on with it, and look at each policy on the way that is not in the file yet."""
    label, seed = "+".join(config.scorers), config.seed
    folder = args.work / f"{label}-{seed}"
    begun = bool(list_checkpoints(folder))
    result = train(replace(config, output_dir=str(folder), resume_from_checkpoint="latest" if begun else None))
    if result.stopped is not None:
        raise SystemExit(f"{folder}: stopped at step {result.step} by {result.stopped}; the same command goes on")
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for step, checkpoint in sorted((int(path.name.rsplit("-", 1)[1]), path) for path in list_checkpoints(folder)):
        kept = read_parts(args.out, PARTS)
        run = kept.get("runs", {}).get(label, {})
        same = kept.get("prompts") == common["prompts"] and is_same(run.get("settings", {}), config)
        if same and str(step) in run["by_seed"].get(str(seed), {}):
            continue
        outcome = panel.take(load_adapter(config.model).load_weights(checkpoint))
        done = [row for row in rounds if row["step"] < step]
        point = {
            "rounds": len(done),
            "denoiser_calls": done[-1]["calls_so_far"],
            "pictures": done[-1]["pictures_so_far"],
            **outcome.to_json(),
        }
        change_result(args.out, PARTS, lambda kept: with_point(kept, common, config, step, point, main))  # noqa: B023
        print(f"{label}, seed {seed}, round {len(done)}: {told(outcome)}", flush=True)


def settings_told(config: OnlineDPOConfig) -> dict[str, Any]:
    """The run's settings as they are saved, without its seed and folder."""
    left_out = ("seed", "output_dir", "resume_from_checkpoint")
    return json.loads(json.dumps({k: v for k, v in to_dict(config).items() if k not in left_out}, default=str))


def is_same(settings: Mapping[str, Any], config: OnlineDPOConfig) -> bool:
    """Whether a run of the file has these settings; how often it is looked at does not matter."""
    kept, ours = ({k: v for k, v in each.items() if k != "save_steps"} for each in (settings, settings_told(config)))
    return kept == ours


def with_prompts(kept: dict[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The file's content, without what was measured on other prompts."""
    return {**(kept if kept.get("prompts") == common["prompts"] else {}), **common}


def with_point(
    kept: dict[str, Any],
    common: Mapping[str, Any],
    config: OnlineDPOConfig,
    step: int,
    point: Mapping[str, Any],
    main: bool,
) -> dict[str, Any]:
    """The file's content with one more policy; a run of other settings is begun anew."""
    kept, label = with_prompts(kept, common), "+".join(config.scorers)
    runs, settings = kept.get("runs", {}), settings_told(config)
    before = runs.get(label, {})
    by_seed = dict(before["by_seed"]) if is_same(before.get("settings", {}), config) else {}
    by_seed[str(config.seed)] = {**by_seed.get(str(config.seed), {}), str(step): point}
    by_seed = {seed: in_order(points) for seed, points in in_order(by_seed).items()}
    steps = in_order({step: None for points in by_seed.values() for step in points})
    points = {step: {seed: by_step[step] for seed, by_step in by_seed.items() if step in by_step} for step in steps}
    run = {"curve": {step: merged(each, common) for step, each in points.items()}}
    runs = {**runs, label: {**run, "settings": settings, "by_seed": by_seed}}
    kept = {**kept, "runs": runs}
    last = points[next(reversed(points))]
    return {**kept, "summary": summary(label, merged(last, common))} if main else kept


def merged(by_seed: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any]) -> dict[str, Any]:
    """Policies of one step over the seeds that have come to it."""
    costs = {
        name: float(np.mean([point[name] for point in by_seed.values()]))
        for name in ("rounds", "denoiser_calls", "pictures")
    }
    return {**costs, **over_seeds(by_seed, common["base"])}


def summary(label: str, final: Mapping[str, Any]) -> dict[str, Any]:
    """What the last policy of the run that counts comes to."""
    rate = final["win_rate"]
    kept = ("prompt_following", "aesthetic", "fidelity", "correct", "diversity_ratio", "alarms", "facts")
    return {
        "judge": label,
        "win_rate": rate["rate"],
        "interval": rate["interval"],
        **{name: final[name] for name in kept},
        **{name: final[name] for name in ("rounds", "denoiser_calls", "pictures", "seeds")},
    }


def best_of_n(config: OnlineDPOConfig, panel: Panel) -> dict[str, Any]:
    """The base's best of n pictures by the judge, and by the oracle, against one of its pictures."""
    exam, most = panel.exam, max(CHOSEN_FROM)
    several = [prompt for prompt in exam.prompts for _ in range(most)]
    settings = replace(exam.settings, seed=exam.settings.seed + OTHER_SEEDS)
    drawn = sample_and_score(load_adapter(config.model), several, load_scorer("scenes-oracle"), settings)
    assert drawn.reward is not None
    scorers = {"+".join(config.scorers): judged(config, drawn.images, several), "scenes-oracle": drawn.reward.reward}
    assert exam.base.reward is not None
    found: dict[str, Any] = {}
    for name, rewards in scorers.items():
        for n in CHOSEN_FROM:
            best = rewards.view(-1, most)[:, :n].argmax(dim=1) + most * np.arange(len(exam.prompts))
            gains = (drawn.reward.reward[best] - exam.base.reward.reward).numpy()
            found.setdefault(name, {})[str(n)] = {
                "win_rate": clustered_win_rate([as_gains(verdicts(gains))]).to_json(),
                **{aspect: float(drawn.reward.aspects[aspect][best].mean()) for aspect in ASPECTS},
            }
    return found


def judged(config: OnlineDPOConfig, images: Any, prompts: list[str]) -> Any:
    """The judge's reward of each picture, as the run has it: the mean of standardised members, higher is better."""
    columns = []
    for name in config.scorers:
        scorer = load_scorer(name)
        reward = scorer.score(images, prompts).reward * (1 if scorer.higher_is_better else -1)
        columns.append((reward - reward.mean()) / reward.std())
    return sum(columns)


def others() -> dict[str, Any]:
    """Rows of ``scenes-rl``: other methods, the same prompts and sampling."""
    path = RESULTS / "scenes_rl.json"
    rows = json.loads(path.read_text())["rows"]
    kept = ("win_rate", "seeds", "denoiser_calls", "scored_pictures", "aspects_gain")
    return {"from": path.name, **{name: {part: rows[name][part] for part in kept} for name in OTHERS}}


def told(outcome: Outcome) -> str:
    """One policy in a line."""
    rate = (as_gains(outcome.verdicts).mean() + 1) / 2
    return (
        f"win rate {rate:.3f}, prompt-following {outcome.aspects['prompt_following']:.3f}, "
        f"fidelity {outcome.aspects['fidelity']:.3f}, diversity {outcome.diversity_ratio:.2f}, "
        f"alarms {', '.join(outcome.alarms) or 'none'}"
    )
