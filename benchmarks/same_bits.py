"""Bits of losses, weights and pictures, here and at an earlier commit, on one machine: what refactoring may not change.

``python -m benchmarks same-bits --against REV`` makes a work tree of REV beside this one, runs the same probes in both
(each in a process of its own, one thread, float32) and compares the hashes. Probes use public names only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [
    "a large red star left of a small blue ring on a dark background",
    "two small blue rings on a dark background",
]
#: Recipe, and what makes a run of it short.
RUNS: dict[str, dict[str, Any]] = {
    "scenes_dpo": {"max_steps": 3, "per_device_train_batch_size": 4},
    "scenes_inpo": {"max_steps": 2, "per_device_train_batch_size": 2},
    "scenes_grpo": {"max_steps": 2, "prompts_per_rollout": 1, "per_device_train_batch_size": 8,
                    "gradient_accumulation_steps": 1, "num_generations": 4, "train_steps": 4},
    "scenes_inpaint_rl": {"max_steps": 2, "prompts_per_rollout": 1, "per_device_train_batch_size": 8,
                          "gradient_accumulation_steps": 1, "num_generations": 4, "train_steps": 4, "trust": "none"},
    "scenes_nft": {"max_steps": 2, "prompts_per_rollout": 1, "num_generations": 4, "per_device_train_batch_size": 4,
                   "gradient_accumulation_steps": 1, "updates_per_picture": 2},
    "scenes_raft": {"max_steps": 2, "prompts_per_rollout": 2, "num_generations": 4, "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 1, "keep": 1, "updates_per_picture": 4},
    "scenes_draft": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    "scenes_vp": {"max_steps": 2, "per_device_train_batch_size": 4, "max_pairs": 32, "validation_split": None,
                  "pair_selection": "first", "scorer": "vp-score", "dataset": "scenes-pairs"},
    "scenes_evaluator": {"max_steps": 2, "per_device_train_batch_size": 8, "max_pairs": 32, "dataset": "scenes-pairs",
                         "real_dataset": None, "kinds": ["alignment", "preference"]},
}  # fmt: skip


def digest(value: Any) -> str:
    """Hash of a tensor's bytes, or of a value's JSON."""
    import torch

    if isinstance(value, torch.Tensor):
        return hashlib.sha256(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()[:16]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def run_of(recipe: str, changes: dict[str, Any]) -> dict[str, str]:
    """Logged losses and saved weights of a short run."""
    from safetensors.torch import load_file

    from diffusion_align import load_recipe, train

    with tempfile.TemporaryDirectory() as folder:
        config = load_recipe(
            recipe, output_dir=folder, mixed_precision="no", report_to="none", progress=False, logging_steps=1,
            eval_steps=0, **changes,
        )  # fmt: skip
        result = train(config)
        losses = [[row["step"], row["loss"], row.get("grad_norm")] for row in result.history if "loss" in row]
        weights = {}
        for path in sorted(Path(folder).rglob("*.safetensors")):
            if "checkpoint-" not in str(path):
                weights |= {f"{path.stem}.{name}": digest(tensor) for name, tensor in load_file(path).items()}
    return {"losses": digest(losses), "weights": digest(weights)}


def pictures_of(model: str) -> dict[str, str]:
    """Pictures and latents of a pipeline, with and without guidance, by its own scheduler and another."""
    import torch
    from diffusers import EulerDiscreteScheduler

    from diffusion_align import load_adapter, sample

    adapter = load_adapter(model)
    inpaint = None
    if adapter.is_inpainting:
        generator = torch.Generator().manual_seed(3)
        pixels = torch.rand(2, 3, adapter.default_resolution, adapter.default_resolution, generator=generator) * 2 - 1
        masks = torch.zeros(2, 1, *pixels.shape[-2:])
        masks[..., 16:48, 16:48] = 1
        inpaint = adapter.encode_inpaint(pixels, masks)
    found = {}
    other = EulerDiscreteScheduler.from_config(adapter.pipeline.scheduler.config)
    for name, options in {
        "guided": {"guidance": 5.0},
        "plain": {"guidance": 1.0},
        "noisy": {"guidance": 3.0, "eta": 1.0},
        "euler": {"guidance": 5.0, "scheduler": other},
    }.items():
        drawn = sample(adapter, PROMPTS, seeds=[1, 2], num_inference_steps=6, inpaint=inpaint, **options)
        found |= {f"{name}/images": digest(drawn.images), f"{name}/latents": digest(drawn.latents)}
    return found


def guided_pictures(model: str, evaluator: str) -> dict[str, str]:
    """Pictures, scales and scores of dynamic guidance."""
    from diffusion_align import DynamicGuidance, load_adapter, sample

    drawn = sample(
        load_adapter(model), PROMPTS, seeds=[1, 2], num_inference_steps=6,
        guidance=DynamicGuidance(evaluator, kinds=("value",) if "uneven" in evaluator else ("alignment", "preference")),
    )  # fmt: skip
    return {"images": digest(drawn.images), "scales": digest(drawn.scales), "records": digest(drawn.records)}


def scores_of(name: str) -> dict[str, str]:
    """Rewards of made pictures."""
    import torch

    from diffusion_align import load_scorer

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {"reward": digest(load_scorer(name).score(images, PROMPTS).reward)}


def probes() -> Iterator[tuple[str, Callable[[], dict[str, str]]]]:
    for model in ("scenes-sdxl", "scenes-sd", "scenes-inpaint"):
        yield f"pictures of {model}", lambda model=model: pictures_of(model)
    for model in ("scenes-sdxl", "scenes-uneven"):
        yield f"dynamic guidance of {model}", lambda model=model: guided_pictures(model, f"{model}-evaluator")
    for scorer in ("scenes-vp", "scenes-vp-words", "scenes-clip", "scenes-oracle"):
        yield f"scores of {scorer}", lambda scorer=scorer: scores_of(scorer)
    for recipe, changes in RUNS.items():
        yield f"run of {recipe}", lambda recipe=recipe, changes=changes: run_of(recipe, changes)


def probe() -> dict[str, str]:
    import torch

    torch.set_num_threads(1)
    found = {}
    for name, measure in probes():
        try:
            values = measure()
        except Exception as error:  # said beside the others, not instead of them
            values = {"error": f"{type(error).__name__}: {error}"}
        found |= {f"{name}: {key}": value for key, value in values.items()}
        print(name, file=sys.stderr, flush=True)
    return found


def probe_in(tree: Path) -> dict[str, str]:
    """Run the probes with the package of ``tree``."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--probe", file.name], check=True, env=environment, cwd=tree
        )
        found: dict[str, str] = json.loads(Path(file.name).read_text())
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks same-bits", description=__doc__)
    parser.add_argument("--against", help="git revision to compare with")
    parser.add_argument("--probe", type=Path, help="(internal) write this tree's hashes there")
    args = parser.parse_args(argv)
    if args.probe:
        args.probe.write_text(json.dumps(probe(), indent=1))
        return
    if not args.against:
        parser.error("--against REV is needed: which commit to compare with")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), args.against], check=True, cwd=ROOT)
        try:
            before = probe_in(tree)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True, cwd=ROOT)
    after = probe_in(ROOT)
    different = 0
    for name in sorted(before.keys() | after.keys()):
        same = before.get(name) == after.get(name) and not name.endswith("error")
        different += not same
        detail = before.get(name) if same else f"{before.get(name)} -> {after.get(name)}"
        print(f"{'equal' if same else 'DIFFERENT'}  {name}  {detail}")
    if different:
        raise SystemExit(f"{different} of {len(before.keys() | after.keys())} differ")


if __name__ == "__main__":
    main(sys.argv[1:])
