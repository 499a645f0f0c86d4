"""The plots in docs/images, drawn from the measured JSON files (no measurement of its own)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusion_align.evaluation.figures import curve_figure, win_rate_bars
from diffusion_align.evaluation.stats import WinRate

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
    methods = json.loads((RESULTS / "scenes_rl.json").read_text())["rows"]
    rates = {
        f"{name} ({row['denoiser_calls'] / 1000:.0f}k calls)": WinRate(**row["win_rate"])
        for name, row in sorted(methods.items(), key=lambda item: item[1]["denoiser_calls"])
        if not name.startswith("inpaint-rl")
    }
    figure = win_rate_bars(rates, "Oracle win rate over the base, by denoiser calls of the training")
    figure.savefig(args.out / "methods.png", dpi=110, bbox_inches="tight")
    print(f"best_of_n.png, reliability.png and methods.png in {args.out}")
