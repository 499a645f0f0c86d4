"""``diffusion-align evaluate guidance``: the table of ways to guide, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_align.data import load_prompts
from diffusion_align.devices import pick_device
from diffusion_align.evaluation import Report
from diffusion_align.evaluation.figures import curve_figure
from diffusion_align.evaluation.guidance import GuidanceComparison, compare_guidance, sweep, usual_ways
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.judges.judge import load_judge
from diffusion_align.rewards import load_scorer
from diffusion_align.scenes.held_out import fresh_prompts

from .opening import open_model
from .options import EvaluateGuidanceOptions


def guidance_table(
    options: EvaluateGuidanceOptions, keep: Callable[[dict[str, Any]], object] = lambda table: None
) -> dict[str, Any]:
    """Sweep the static scale on validation prompts, then compare everything on the test prompts.

    Args:
        keep: called after each row with the table so far, because the whole table takes long.

    Raises:
        ValueError, FileNotFoundError: a file, model or setting that cannot be used.
    """
    test, validation = prompt_sets(options)
    device = pick_device(options.device)
    adapter = open_model(options, device)
    judge = load_scorer(options.scorer).to(device)
    settings: dict[str, Any] = {"steps": options.num_inference_steps, "batch_size": options.batch_size}
    tried: dict[float, float] = {}
    if options.static is None:
        tried = sweep(GuidanceComparison(adapter, judge, validation, **settings), options.sweep)
        print(f"mean reward of static scales on {len(validation)} validation prompts: {tried}", flush=True)
    static = max(tried, key=lambda scale: tried[scale]) if options.static is None else options.static
    kinds = load_judge(options.evaluator).kinds
    ways: dict[str, tuple[str, ...]] = {" + ".join(options.evaluators): options.evaluators}
    ways |= {" + ".join(some): some for some in (*((kind,) for kind in kinds), kinds)}
    dynamic = {
        name: DynamicGuidance(
            options.evaluator, some, options.candidates, options.weighting, options.normalise, fallback=static
        )
        for name, some in ways.items()
        if "dynamic" in options.ways
    }
    selector = None if options.selector is None else load_scorer(options.selector).to(device)
    comparison = GuidanceComparison(adapter, judge, test, seeds=options.seeds, **settings)
    table: dict[str, Any] = {
        "model": options.model,
        "prompts": len(test),
        "validation_prompts": len(validation),
        "seeds": list(options.seeds),
        "steps": options.num_inference_steps,
        "candidates": list(options.candidates),
        "weighting": options.weighting,
        "normalise": options.normalise,
        "sweep_on_validation": {f"{scale:g}": reward for scale, reward in tried.items()},
        "best_static": static,
        "rows": {},
    }
    usual = usual_ways(static) if "usual" in options.ways else {}
    for name, row in compare_guidance(comparison, static, dynamic, selector, usual):
        table["rows"][name] = row
        print(f"{name}: win rate {row['win_rate']['rate']:.3f}", flush=True)
        keep(table)
    return table


def prompt_sets(options: EvaluateGuidanceOptions) -> tuple[list[str], list[str]]:
    """Test and validation prompts: from the files, or fresh ones of scenes that no shipped training pair has."""
    counts = options.num_prompts, options.num_validation_prompts
    if options.prompts is not None and options.validation_prompts is not None:
        files = load_prompts(options.prompts), load_prompts(options.validation_prompts)
        return files[0][: counts[0]], files[1][: counts[1]]
    return fresh_prompts(*counts)


def evaluate_guidance(options: EvaluateGuidanceOptions) -> Path:
    """Write ``table.json`` and ``report.html``; returns the report's path."""
    table = guidance_table(options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    report = Report("Ways to guide, at equal denoiser calls")
    report.text(
        f"`{options.model}`, {table['prompts']} prompts x {len(options.seeds)} seeds, {options.num_inference_steps} "
        f"steps, judged by `{options.scorer}`. The best static scale on {table['validation_prompts']} other prompts is "
        f"{table['best_static']:g}; win rates are over it, with a 95% interval clustered by prompt."
    )
    report.table([readable(name, row) for name, row in table["rows"].items()])
    curves = {
        name: list(enumerate(row["mean_scale_by_step"]))
        for name, row in table["rows"].items()
        if "mean_scale_by_step" in row
    }
    report.figure(curve_figure(curves, "Mean guidance scale", "scale"), "Mean guidance scale by step")
    return report.write(out)


def readable(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the page's table."""
    low, high = row["win_rate"]["interval"]
    cells: dict[str, Any] = {"way": name, "calls": f"{row['nfe']:g}"}
    cells["win rate"] = f"{row['win_rate']['rate']:.1%} [{low:.1%}, {high:.1%}]"
    for aspect, gap in row["over_static"].items():
        cells[aspect.replace("_", " ")] = (
            f"{row[aspect]['mean']:.3f} ({gap['mean']:+.3f} ± {gap['standard_error']:.3f})"
        )
    return cells


def run(options: EvaluateGuidanceOptions) -> int:
    """Compare, and print the report's file; returns the exit status."""
    print(f"report: {evaluate_guidance(options)}")
    return 0
