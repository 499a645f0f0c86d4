"""``diffusion-align evaluate scorer``: how well scorers predict people's verdicts on pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_align.commands.console import Progress, conclude, note
from diffusion_align.commands.console.text_table import aligned, filled
from diffusion_align.data import Comparisons
from diffusion_align.devices import pick_device
from diffusion_align.environment import git_commit, versions
from diffusion_align.evaluation.accuracy import best_tie_threshold, calibration_curve
from diffusion_align.evaluation.judging import judge, judged_metrics
from diffusion_align.evaluation.report import Report
from diffusion_align.evaluation.stats import MeanInterval, clustered_mean
from diffusion_align.rewards import load_scorer

from .comparison_table import write_table
from .scorer_options import EvaluateScorerOptions

#: Bins of the calibration curve.
BINS = 10


@dataclass(frozen=True)
class ScorerFound:
    """What one scorer came to.

    Attributes:
        metrics: as ``evaluate_scorer`` names them.
        accuracy: on decisive pairs, mean over prompts with its interval over prompts.
        calibration: (mean probability, mean outcome, pairs) of each bin that is not empty.
    """

    metrics: Mapping[str, float]
    accuracy: MeanInterval | None
    calibration: Sequence[tuple[float, float, int]]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        accuracy = None if self.accuracy is None else self.accuracy.to_json()
        return {
            **self.metrics,
            "accuracy_by_prompt": accuracy,
            "calibration": [list(each) for each in self.calibration],
        }


def evaluate_scorers(options: EvaluateScorerOptions, progress: Progress) -> dict[str, Any]:
    """Judge the pairs with every scorer; returns what table.json holds.

    Raises:
        ValueError, FileNotFoundError, OSError: pairs or scorers that cannot be used.
    """
    if options.out is not None:
        taken = [name for name in ("table.json", "report.html") if (Path(options.out) / name).exists()]
        if taken and not options.overwrite:
            raise ValueError(f"{Path(options.out) / taken[0]} is already there: give --overwrite, or another --out")
    seed = options.seed if options.max_pairs is not None else None
    pairs = Comparisons(options.dataset, options.split, options.max_pairs, seed=seed)
    other = None if options.validation_split is None else Comparisons(options.dataset, options.validation_split)
    prompts = captions(pairs)
    found: dict[str, ScorerFound] = {}
    ties = 0
    for number, name in enumerate(options.scorers):
        progress(name, number, len(options.scorers))
        scorer = load_scorer(name, device=pick_device(options.device))
        if scorer.needs - {"users", "instructions", "source_images"}:
            raise ValueError(f"scorer {name} needs {', '.join(sorted(scorer.needs))}, which pairs do not have")
        threshold = None
        if other is not None:
            chosen = judge(scorer, other, options.batch_size)
            threshold = best_tie_threshold(chosen["overall"], chosen["overall/label"])
        judged = judge(scorer, pairs, options.batch_size)
        differences, labels = judged["overall"], judged["overall/label"]
        ties = int((labels == 0.5).sum())
        probabilities = 1 / (1 + np.exp(-differences))
        found[name] = ScorerFound(
            judged_metrics(judged, pairs, threshold),
            by_prompt(differences, labels, prompts),
            calibration_curve(probabilities, labels, BINS),
        )
    return {
        "dataset": options.dataset,
        "split": options.split,
        "pairs": len(pairs),
        "ties": ties,
        "prompts": len(set(prompts)),
        "tie_threshold_from": options.validation_split or "these pairs, which flatters accuracy_with_ties",
        "scorers": {name: each.to_json() for name, each in found.items()},
        "versions": versions(),
        "git_commit": git_commit(),
    }


def captions(pairs: Comparisons) -> list[str]:
    """The prompt of each pair; pictures are not read."""
    column = pairs.source.table.select_columns(["caption"]).to_dict()["caption"]
    return [str(column[row]) for row in pairs.rows]


def by_prompt(
    differences: NDArray[np.floating[Any]], labels: NDArray[np.floating[Any]], prompts: Sequence[str]
) -> MeanInterval | None:
    """Accuracy on decisive pairs, prompts weighing the same, with an interval that resamples prompts; None without
    any. A score difference of 0 is half right."""
    right: dict[str, list[float]] = {}
    for difference, label, prompt in zip(differences.tolist(), labels.tolist(), prompts, strict=True):
        if label != 0.5:
            right.setdefault(prompt, []).append(0.5 if difference == 0 else float((difference > 0) == (label > 0.5)))
    if not right:
        return None
    return clustered_mean(np.array([np.mean(right[prompt]) for prompt in sorted(right)]))


def rows(table: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table for people: a line for each scorer."""
    found = []
    for name, metrics in table["scorers"].items():
        row = {"scorer": name}
        accuracy = metrics["accuracy_by_prompt"]
        for key, value in metrics.items():
            if isinstance(value, float):
                row[key.replace("_", " ")] = f"{value:.3f}"
        if accuracy is not None:
            low, high = accuracy["interval"]
            row["by prompt"] = f"{accuracy['mean']:.3f} [{low:.3f}, {high:.3f}]"
        found.append(row)
    return filled(found)


def write_report(folder: Path, table: Mapping[str, Any]) -> Path:
    """table.json and report.html."""
    write_table(folder / "table.json", table)
    report = Report(f"Scorers beside people: {table['dataset']}")
    report.text(
        f"{table['pairs']} pairs of {table['prompts']} prompts, {table['ties']} ties ({table['split']} split). "
        "**accuracy** is on decisive pairs; **accuracy with ties** on all, by Pick-a-Pic's protocol, its threshold "
        f"from {table['tie_threshold_from']}; **ranking K** is the share of rankings of K pictures without a wrong "
        "pair; **by prompt** weighs prompts alike, with a 95% interval that resamples them."
    )
    report.table(rows(table))
    curves = {name: [(p, seen) for p, seen, _ in each["calibration"]] for name, each in table["scorers"].items()}
    report.text("## Calibration\n\nHow often the first picture was preferred, by the probability that it would be.")
    report.chart({**curves, "perfect": [(0.0, 0.0), (1.0, 1.0)]}, "Share of verdicts by predicted probability", 1, "P")
    report.facts({**table["versions"], "git commit": table["git_commit"] or "not known"})
    return report.write(folder)


def run(options: EvaluateScorerOptions) -> int:
    """Judge, and print the table; returns the exit status."""
    with Progress("evaluate scorer") as progress:
        table = evaluate_scorers(options, progress)
    if options.validation_split is None and table["ties"]:
        note("the threshold for ties was chosen on these very pairs: --validation-split NAME takes another split")
    written = None if options.out is None else write_report(Path(options.out), table)
    lines = [f"{table['pairs']} pairs of {table['prompts']} prompts, {table['ties']} ties", *aligned(rows(table))]
    conclude("\n".join(lines if written is None else [*lines, f"report: {written}"]), table)
    return 0
