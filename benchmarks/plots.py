"""The plots in docs/images, drawn from the measured JSON files (no measurement of its own)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusion_align.evaluation.figures import curve_figure

from .harness import RESULTS


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plots", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS.parent.parent / "docs" / "images")
    args = parser.parse_args(argv)
    rewards = json.loads((RESULTS / "scenes_rewards.json").read_text())
    best = rewards["best-of-n"]
    curves = {
        name: list(zip((n.bit_length() - 1 for n in best["n"]), row["mean"], strict=True))
        for name, row in best["oracle_reward"].items()
    }
    figure = curve_figure(curves, "What the chosen picture is worth", "oracle score", xlabel="log2 of n")
    figure.savefig(args.out / "best_of_n.png", dpi=110, bbox_inches="tight")
    points = [(predicted, seen) for predicted, seen, _ in rewards["accuracy"]["calibration_curve"]]
    figure = curve_figure(
        {"scenes-vp": points, "calibrated": [(0.0, 0.0), (1.0, 1.0)]},
        "Predicted probability against what users chose",
        "share of pairs",
        xlabel="predicted probability",
    )
    figure.savefig(args.out / "reliability.png", dpi=110, bbox_inches="tight")
    print(f"best_of_n.png and reliability.png in {args.out}")
