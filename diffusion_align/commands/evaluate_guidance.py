"""``diffusion-align evaluate guidance``: the table of ways to guide, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusion_align.data import load_prompts
from diffusion_align.devices import pick_device
from diffusion_align.evaluation.figures import curve_figure, reduced
from diffusion_align.evaluation.guidance import GuidanceComparison, GuidanceTrial, sweep
from diffusion_align.evaluation.guidance_rows import Rows, Show, compare_guidance, slopes, usual_ways
from diffusion_align.evaluation.report import STAR, Report, favourite
from diffusion_align.files import check_free
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.judges.judge import load_judge
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.scenes.held_out import fresh_prompts

from .console import conclude, note
from .guiding.guidance_options import EvaluateGuidanceOptions
from .guiding.learned_ways import LearnedWays, check_schedule
from .opening import evaluator_for, open_contrastive, say_what_is_cut


def guidance_table(
    options: EvaluateGuidanceOptions,
    keep: Callable[[dict[str, Any]], object] = lambda table: None,
    show: Show = lambda name, trial: None,
) -> dict[str, Any]:
    """Sweep the static scale on validation prompts, then compare everything on the test prompts.

    Args:
        keep: called after each row with the table so far, because the whole table takes long.
        show: told each row's name and what it gave, pictures among it.

    Raises:
        ValueError, FileNotFoundError: a file, model or setting that cannot be used.
    """
    test, validation = prompt_sets(options)
    check_schedule(options)
    device = pick_device(options.device)
    adapter = open_contrastive(options, device, options.negative_lora, options.negative_keep, None)
    say_what_is_cut(adapter, test)
    judge = load_scorer(options.scorer).to(device)
    settings: dict[str, Any] = {"steps": options.num_inference_steps, "batch_size": options.batch_size}
    tried: dict[float, float] = {}
    chosen_on = GuidanceComparison(adapter, judge, validation, **settings)
    if options.static is None:
        tried = sweep(chosen_on, {scale: chosen_on.guided(float(scale)) for scale in options.sweep})
        note(f"mean reward of static scales on {len(validation)} validation prompts: {tried}")
    static = max(tried, key=lambda scale: tried[scale]) if options.static is None else options.static
    comparison = GuidanceComparison(
        adapter, judge, test, seeds=options.seeds, measured=options.matched_prompts, shown=options.shown, **settings
    )
    table: dict[str, Any] = {
        "model": options.model,
        "prompts": len(test),
        "shown_prompts": test[: options.shown],
        "validation_prompts": len(validation),
        "seeds": list(options.seeds),
        "steps": options.num_inference_steps,
        "candidates": list(options.candidates),
        "weighting": options.weighting,
        "normalise": options.normalise,
        "sweep_on_validation": {f"{scale:g}": reward for scale, reward in tried.items()},
        "best_static": static,
        "matched_prompts": options.matched_prompts,
        "rows": {},
    }
    learned = LearnedWays(options, static, comparison, chosen_on)
    rows = replace(chosen_rows(options, static, judge, device), ways=learned.ways())
    for name, row in compare_guidance(comparison, static, rows, show):
        table["chosen_on_validation"] = learned.chosen
        table["rows"][name] = row
        table["curve"] = slopes(table["rows"], options.sweep)
        note(f"{name}: win rate {row['win_rate']['rate']:.3f}{matched(row)}")
        keep(table)
    return table


def matched(row: Mapping[str, Any]) -> str:
    """A row's effective scale and its win rate over static guidance at it, in words; empty where it has none."""
    if "matched" not in row:
        return ""
    beside = row["matched"]
    return f", {beside['win_rate']['rate']:.3f} over static {beside['scale']:g}"


def chosen_rows(options: EvaluateGuidanceOptions, static: float, judge: RewardScorer, device: torch.device) -> Rows:
    """What ``--ways`` asks for, with the best static scale.

    Raises:
        ValueError, FileNotFoundError: an evaluator or scorer that cannot be used.
    """
    ways, bounds = options.ways, "bound" in options.ways
    dynamic: dict[str, DynamicGuidance] = {}
    if "dynamic" in ways or bounds:
        evaluator = evaluator_for(options.model, options.evaluator)
        kinds = load_judge(evaluator).kinds
        tried = [options.evaluators, *((kind,) for kind in kinds), kinds] if "dynamic" in ways else [options.evaluators]
        dynamic = {
            " + ".join(some): DynamicGuidance(
                evaluator, some, options.candidates, options.weighting, options.normalise, fallback=static
            )
            for some in tried
        }
    scorer = judge if options.bound_scorer is None else load_scorer(options.bound_scorer).to(device)
    return Rows(
        curve=options.sweep if "curve" in ways else (),
        dynamic=dynamic,
        per_prompt=options.sweep if bounds else (),
        bound=scorer if bounds else None,
        selector=None if options.selector is None else load_scorer(options.selector).to(device),
        stops=options.stops if "step-ag" in ways else (),
        usual=usual_ways(static) if "usual" in ways else {},
        matched=options.matched_prompts > 0,
    )


def prompt_sets(options: EvaluateGuidanceOptions) -> tuple[list[str], list[str]]:
    """Test and validation prompts: from the files, or fresh ones of scenes that no shipped training pair has."""
    counts = options.num_prompts, options.num_validation_prompts
    if options.prompts is not None and options.validation_prompts is not None:
        files = load_prompts(options.prompts), load_prompts(options.validation_prompts)
        return files[0][: counts[0]], files[1][: counts[1]]
    return fresh_prompts(*counts)


def evaluate_guidance(options: EvaluateGuidanceOptions) -> Path:
    """Write ``table.json`` and ``report.html``; returns the report's path."""
    out = Path(options.out)
    check_free([out / "table.json", *([] if options.fit is None else [Path(options.fit)])], options.overwrite)
    trials: dict[str, GuidanceTrial] = {}
    table = guidance_table(options, show=trials.__setitem__)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    report = Report("Ways to guide, at equal denoiser calls")
    report.text(
        f"`{options.model}`, {table['prompts']} prompts x {len(options.seeds)} seeds, {options.num_inference_steps} "
        f"steps, judged by `{options.scorer}`. The best static scale on {table['validation_prompts']} other prompts is "
        f"{table['best_static']:g}; win rates are over it, with a 95% interval clustered by prompt. The effective "
        "scale is the one at which classifier-free guidance comes nearest to a way; what it does beside is its "
        "orthogonal share. The last win rate is over classifier-free guidance at that scale. Rows that are called "
        "bounds were told by a judge: they show how much room there is."
    )
    report.table(readable(table["rows"]), surest(table["rows"]))
    report.text(f"{STAR}marks the largest win rate that is above 50% with all of its interval; bounds do not count.")
    add_pictures(report, table["shown_prompts"], trials, options.scorer)
    curve = table["curve"]
    for name in curve["values"] if len(curve["scales"]) > 1 else ():
        points = list(zip(curve["scales"], curve["values"][name], strict=True))
        caption = f"{name.replace('_', ' ')} of static guidance: {growth(curve, name)} when the scale doubles"
        report.chart({name: points}, caption, xlabel="scale")
    curves = {
        name: list(enumerate(row["mean_scale_by_step"]))
        for name, row in table["rows"].items()
        if "mean_scale_by_step" in row
    }
    report.figure(curve_figure(curves, "Mean guidance scale", "scale"), "Mean guidance scale by step")
    return report.write(out)


def surest(rows: Mapping[str, Mapping[str, Any]]) -> set[tuple[int, str]]:
    """The cell that is marked; none where no way is surely better than the best static scale."""
    rates = [row["win_rate"] for row in rows.values()]
    sure = [i for i, row in enumerate(rows.values()) if not row["bound"] and rates[i]["interval"][0] > 0.5]
    return {(max(sure, key=lambda i: float(rates[i]["rate"])), "win rate")} if sure else set()


def add_pictures(report: Report, prompts: Sequence[str], trials: Mapping[str, GuidanceTrial], scorer: str) -> None:
    """What each way made of the first prompts."""
    shown = {name: trial.shown for name, trial in trials.items() if trial.shown is not None}
    rewards = torch.stack([trials[name].reward[0] for name in shown])  # (ways, prompts)
    best = [favourite(rewards[:, number].tolist()) for number in range(len(prompts))]
    rows = [[reduced(pictures[number]) for pictures in shown.values()] for number in range(len(prompts))]
    told = f"The first prompts, first seed, not selected; {STAR}is the best of a prompt by {scorer}, where one is"
    report.text("## Pictures")
    report.pictures(rows, prompts, list(shown), told, best)


def growth(curve: Mapping[str, Any], name: str) -> str:
    """How much a value grows when the scale doubles, in words."""
    return f"{curve['per_doubling'][name]:+.3f}"


def readable(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The page's table; a cell that a row has nothing for is empty."""
    values = dict.fromkeys(name for row in rows.values() for name in row["over_static"])
    found = []
    for name, row in rows.items():
        cells: dict[str, Any] = {"way": name, "calls": f"{row['nfe']:g}", "time": f"{row['seconds_ratio']:.2f}"}
        cells["scale"] = number(row.get("nominal_scale"))
        cells["effective"] = number(row.get("effective_scale"))
        cells["orthogonal"] = number(row.get("orthogonal_share"))
        cells["win rate"] = won(row["win_rate"])
        beside = row.get("matched")
        cells["over CFG at effective scale"] = "" if beside is None else won(beside["win_rate"])
        for value in values:
            cells[value.replace("_", " ")] = difference(row, value)
        found.append(cells)
    return found


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def won(rate: Mapping[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{rate['rate']:.1%} [{low:.1%}, {high:.1%}]"


def difference(row: Mapping[str, Any], value: str) -> str:
    """A value's mean and its difference from the best static scale's; empty where the row has none."""
    if value not in row["over_static"]:
        return ""
    gap = row["over_static"][value]
    return f"{row[value]['mean']:.3f} ({gap['mean']:+.3f} ± {gap['standard_error']:.3f})"


def run(options: EvaluateGuidanceOptions) -> int:
    """Compare, and print the report's file; returns the exit status."""
    report = evaluate_guidance(options)
    conclude(f"report: {report}", {"report": str(report), **json.loads((report.parent / "table.json").read_text())})
    return 0
