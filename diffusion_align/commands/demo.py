"""``diffusion-align demo``: DPO and InPO on the embedded world, compared with the base on held-out prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.environment import git_commit, versions
from diffusion_align.evaluation import Report, WinRate
from diffusion_align.evaluation.compare import Sampled, SamplingSettings, compare, sample_and_score
from diffusion_align.evaluation.figures import curve_figure, win_rate_bars
from diffusion_align.files import check_writable, read_object, with_checksum, write_whole
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.sampling.sampler import to_uint8
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.training.engine.loop import TrainResult
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_recipe

from .console import conclude, note
from .options import DemoOptions

METHODS = {"dpo": "Diffusion-DPO", "inpo": "DDIM-InPO"}
#: What the shipped LoRA of online preference learning is called in the report.
ALIGNED = "scenes-aligned"
#: How all sides draw: with half the calls of the usual 20 DDIM steps, so that the demo takes minutes on two cores.
DRAWN = SamplingSettings(num_inference_steps=10, scheduler="dpm++")
#: In a demo's folder: the pairs as latents, made once for both methods (and kept for the next time).
CACHE = "cache"
#: In a demo's folder: the settings that decide what it holds.
RECORD, OF_A_DEMO = "demo.json", ("num_prompts", "dpo_steps", "inpo_steps", "seed")


@dataclass(frozen=True)
class Outcome:
    """One method's run and its comparison with the base."""

    config: TrainConfig
    result: TrainResult
    sampled: Sampled
    win_rate: WinRate
    seconds: float


def claim(options: DemoOptions) -> Path:
    """The folder, which is new, empty, or of a demo with the same settings, which will be made anew; or else
    ``overwrite`` says that it may be taken.

    Raises:
        FileExistsError: it holds something else; what is in its way is named.
        OSError: it cannot be written.
    """
    out, task = Path(options.out), {name: getattr(options, name) for name in OF_A_DEMO}
    record = out / RECORD
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if there and not options.overwrite:
        before = read_object(record).get("task") if record.is_file() else None
        if before != task:
            told = f"{there[0]} and no {RECORD}" if before is None else f"a demo with {before}"
            raise FileExistsError(f"{out} holds {told}: give another --out, or --overwrite")
    check_writable(out)
    write_whole(record, json.dumps(with_checksum({"task": task}), indent=1).encode() + b"\n")
    return out


def run_demo(options: DemoOptions) -> Path:
    """Encode the pairs, train both methods, compare, write ``report.html`` and ``summary.json``.

    Returns the report's path.

    Raises:
        FileExistsError, OSError: as ``claim``.
    """
    out, started = claim(options), time.perf_counter()
    prompts, scorer, settings = held_out_prompts(options.num_prompts), load_scorer("scenes-oracle"), DRAWN
    note(f"drawing {len(prompts)} held-out prompts with the base model")
    base = sample_and_score(load_adapter("scenes-sdxl"), prompts, scorer, settings)
    aligned = sample_and_score(load_adapter("scenes-sdxl").load_weights(ALIGNED), prompts, scorer, settings)
    sides, rates, outcomes = {"base": base, ALIGNED: aligned}, {ALIGNED: compare(aligned, base)}, {}
    note(f"{ALIGNED}, which comes with the package: win rate over the base {rates[ALIGNED]}")
    for method, steps in (("dpo", options.dpo_steps), ("inpo", options.inpo_steps)):
        config = load_recipe(
            f"scenes_{method}",
            output_dir=str(out / method),
            overwrite_output_dir=True,
            cache_dir=str(out / CACHE),
            seed=options.seed,
            report_to="none",
            **({} if steps is None else {"max_steps": steps}),
        )
        assert isinstance(config, TrainConfig)
        outcomes[method] = run_method(config, prompts, base, scorer, settings)
        note(f"{METHODS[method]}: win rate over the base {outcomes[method].win_rate}")
        sides[METHODS[method]], rates[METHODS[method]] = outcomes[method].sampled, outcomes[method].win_rate
    summary = {
        method: {
            "win_rate": outcome.win_rate.rate,
            "interval": list(outcome.win_rate.interval),
            "steps": outcome.result.step,
        }
        for method, outcome in outcomes.items()
    }
    summary[ALIGNED] = {"win_rate": rates[ALIGNED].rate, "interval": list(rates[ALIGNED].interval), "steps": 0}
    report = write_report(out, prompts, sides, rates, outcomes, time.perf_counter() - started)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return report


def run_method(
    config: TrainConfig,
    prompts: Sequence[str],
    base: Sampled,
    scorer: RewardScorer,
    settings: SamplingSettings,
) -> Outcome:
    """Train ``config`` and compare the policy with ``base`` on ``prompts``, same seeds."""
    note(f"{METHODS[config.method]}: {config.max_steps} steps")
    started = time.perf_counter()
    adapter: Adapter = load_adapter(config.model)
    result = train(config, adapter)
    if result.stopped is not None:
        raise RuntimeError(f"the demo was stopped by {result.stopped}")
    seconds = time.perf_counter() - started
    sampled = sample_and_score(adapter, prompts, scorer, settings)
    return Outcome(config, result, sampled, compare(sampled, base), seconds)


def write_report(
    out: Path,
    prompts: Sequence[str],
    sides: dict[str, Sampled],
    rates: dict[str, WinRate],
    outcomes: dict[str, Outcome],
    seconds: float,
    pictures: int = 8,
) -> Path:
    """The demo's HTML page, with PNG files beside it.

    Args:
        sides: what each model drew for ``prompts``, by its name, the base first.
        rates: of the others over the base.
        outcomes: of the methods that were trained here.
    """
    report = Report("diffusion-align demo: preference alignment on the embedded world")
    report.text(
        "A small SDXL-layout model (`scenes-sdxl`) was fine-tuned with LoRA on about a thousand preference pairs, by "
        f"Diffusion-DPO and by DDIM-InPO. `{ALIGNED}` comes with the package: a LoRA that `train online-dpo` made "
        "in 25 minutes from pictures of its own. Base and fine-tuned models then drew the same "
        f"**{len(prompts)} held-out prompts from the same seeds**, and an oracle that knows the world judged each pair "
        "of pictures by prompt-following, aesthetics and fidelity.\n\n## Win rate over the base model"
    )
    report.table([{"method": name, **_rate_row(rate)} for name, rate in rates.items()])
    report.figure(win_rate_bars(rates), "Win rate over the base (ties count half), 95% interval")
    report.text("## What changed\n\nMean oracle scores, each in 0..1.")
    report.table([_scores_row(name, side) for name, side in sides.items()])
    images = [to_uint8(side.images[:pictures]) for side in sides.values()]
    rows = [list(row) for row in zip(*images, strict=True)]
    told = f"The first {len(rows)} held-out prompts, the same seed for all models (not selected)"
    report.pictures(rows, prompts[: len(rows)], list(sides), told)
    report.text("## Training")
    for metric, title in (
        ("loss", "Preference loss (log 2 = 0.693 is no preference)"),
        ("implicit_accuracy", "Share of pairs on which the policy agrees with the label"),
        ("chosen_error_up", "Share of pairs whose chosen image the policy predicts worse than the base"),
    ):
        curves = {
            METHODS[m]: [(h["step"], h[metric]) for h in o.result.history if metric in h] for m, o in outcomes.items()
        }
        report.figure(curve_figure(curves, title, metric, smooth=5), title)
    for method, outcome in outcomes.items():
        config = outcome.config
        report.text(f"### {METHODS[method]}")
        report.facts(
            {
                "recipe": f"training/recipes/scenes/scenes_{method}.yaml",
                "steps x pairs": f"{outcome.result.step} x {config.per_device_train_batch_size}",
                "training time": f"{outcome.seconds:.0f} s",
                "seed": config.seed,
                "weights": f"{method}/{outcome.result.weights.name if outcome.result.weights else ''}",
            }
        )
    report.text("## Environment")
    report.facts({**versions(), "git commit": git_commit() or "unknown", "total time": f"{seconds:.0f} s"})
    return report.write(out)


def _rate_row(rate: WinRate) -> dict[str, object]:
    low, high = rate.interval
    return {
        "win rate": f"{rate.rate:.1%}",
        "95% interval": f"{low:.1%} to {high:.1%}",
        "wins": rate.wins,
        "losses": rate.losses,
        "ties": rate.ties,
    }


def _scores_row(name: str, side: Sampled) -> dict[str, object]:
    assert side.reward is not None
    means = {aspect.replace("_", " "): f"{float(values.mean()):.3f}" for aspect, values in side.reward.aspects.items()}
    return {"model": name, "overall": f"{float(side.reward.reward.mean()):.3f}", **means}


def run(options: DemoOptions) -> int:
    """Train, compare, and print the report's file; returns the exit status."""
    report = run_demo(options)
    conclude(f"report: {report}", {"report": str(report)})
    return 0
