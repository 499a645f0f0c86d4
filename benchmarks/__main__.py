"""``python -m benchmarks NAME [options]``; each benchmark prints its result and writes it to ``--out``."""

from __future__ import annotations

import sys
from importlib import import_module

#: Module of each benchmark, imported when it is run, and what it measures.
BENCHMARKS = {
    "dpo-step": ("dpo_step", "pairs per second and memory of the DPO step against the published scripts' way"),
    "dpo-script": ("dpo_script", "whole runs against diffusers' own script: time, memory, win rates"),
    "scenes-dpo-inpo": ("scenes.dpo_inpo", "win rates of DPO and InPO over the base, three training seeds"),
    "scenes-noise-draws": ("scenes.noise_draws", "fixed noise with remembered reference errors: win rates, speed"),
    "scenes-off-policy": ("scenes.off_policy", "DPO, InPO and SmPO on pairs of the policy's own pictures and others'"),
    "scenes-rewards": (
        "scenes.reward_scorers",
        "scorers trained on the embedded world: accuracy, calibration, speed, use",
    ),
    "scenes-guidance": ("scenes.guided", "dynamic guidance and its rivals at equal denoiser calls, and its cost"),
    "scorer-process": ("scorer_process", "rollouts with a reward here and in another process"),
    "scenes-rl": ("scenes.online_methods", "online methods: win rates over the base by the oracle, and what they cost"),
    "scenes-family": ("scenes.family", "preference methods at equal pairs seen and at equal denoiser calls"),
    "scenes-online": ("scenes.online_curve", "online-dpo over rounds, its upper bounds, and facts that a base knows"),
    "sdxl-memory": ("sdxl_memory", "memory of SDXL training, counted at its true size without weights"),
    "shards": ("shards", "streaming a million pairs: start, resume, order, waiting"),
    "true-size": ("true_size.command", "a model of true size used from every layout; memory and its estimates"),
    "plots": ("plots", "the plots in docs/images, from the measured files"),
    "faults": ("faults", "commands that are killed at random instants and started again: equal files in the end?"),
    "same-bits": ("same_bits", "losses, weights and pictures here and at an earlier commit, bit for bit"),
    "base-quality": ("shipped.base_quality", "oracle scores of a shipped pipeline per guidance scale"),
    "shipped-weights": ("shipped.weights", "packed weights against their float16 originals"),
    "gpu": ("gpu", "what one GPU says: the product, SDXL's step and memory, other scripts, guidance, compiling"),
    "performance-page": ("performance_page", "docs/performance.md, from what the gpu benchmark wrote"),
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
