"""``python -m benchmarks NAME [options]``; each benchmark prints its result and writes it to ``--out``."""

from __future__ import annotations

import sys
from importlib import import_module

#: Module of each benchmark, imported when it is run, and what it measures.
BENCHMARKS = {
    "dpo-step": ("dpo_step", "pairs per second and memory of the DPO step against the published scripts' way"),
    "dpo-script": ("dpo_script", "whole runs against diffusers' own script: time, memory, win rates"),
    "scenes-dpo-inpo": ("scenes_dpo_inpo", "win rates of DPO and InPO over the base, three training seeds"),
    "scenes-noise-draws": ("scenes_noise_draws", "fixed noise with remembered reference errors: win rates, speed"),
    "scenes-rewards": ("scenes_rewards", "scorers trained on the embedded world: accuracy, calibration, speed, use"),
    "scenes-guidance": ("scenes_guidance", "dynamic guidance and its rivals at equal denoiser calls, and its cost"),
    "scenes-rl": ("scenes_rl", "online methods: win rates over the base by the oracle, and what they cost"),
    "sdxl-memory": ("sdxl_memory", "memory of SDXL training, counted at its true size without weights"),
    "plots": ("plots", "the plots in docs/images, from the measured files"),
    "same-bits": ("same_bits", "losses, weights and pictures here and at an earlier commit, bit for bit"),
    "base-quality": ("base_quality", "oracle scores of a shipped pipeline per guidance scale"),
from . import (
    base_quality,
    dpo_step,
    plots,
    scenes_dpo_inpo,
    scenes_guidance,
    scenes_rewards,
    scenes_rl,
    sdxl_memory,
    shipped_weights,
    dpo_script,
    dpo_step,
    plots,
    same_bits,
    scenes_dpo_inpo,
    scenes_guidance,
    scenes_noise_draws,
    scenes_rewards,
    scenes_rl,
    sdxl_memory,
)

BENCHMARKS = {
    "dpo-step": (dpo_step.main, "pairs per second and memory of the DPO step against the published scripts' way"),
    "scenes-dpo-inpo": (scenes_dpo_inpo.main, "win rates of DPO and InPO over the base, three training seeds"),
    "scenes-noise-draws": (scenes_noise_draws.main, "fixed noise with remembered reference errors: win rates, speed"),
    "scenes-rewards": (scenes_rewards.main, "scorers trained on the embedded world: accuracy, calibration, speed, use"),
    "scenes-guidance": (scenes_guidance.main, "dynamic guidance and its rivals at equal denoiser calls, and its cost"),
    "scenes-rl": (scenes_rl.main, "online methods: win rates over the base by the oracle, and what they cost"),
    "sdxl-memory": (sdxl_memory.main, "memory of SDXL training, counted at its true size without weights"),
    "plots": (plots.main, "the plots in docs/images, from the measured files"),
    "shipped-weights": (shipped_weights.main, "packed weights against their float16 originals"),
    "same-bits": (same_bits.main, "losses, weights and pictures here and at an earlier commit, bit for bit"),
    "dpo-script": (dpo_script.main, "whole runs against diffusers' own script: time, memory, win rates"),
    "base-quality": (base_quality.main, "oracle scores of a shipped pipeline per guidance scale"),
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        print("usage: python -m benchmarks NAME [--help]\n")
        for name, (_, text) in BENCHMARKS.items():
            print(f"  {name:<18}{text}")
        return 0 if sys.argv[1:2] in ([], ["-h"], ["--help"]) else 2
    import_module(f".{BENCHMARKS[sys.argv[1]][0]}", __package__).main(sys.argv[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
