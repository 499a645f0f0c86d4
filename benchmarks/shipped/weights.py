"""What packing the shipped weights into few bits changed: each packed asset against its float16 original.

``predictions``: relative error of a pipeline's noise prediction at all noise levels, prompts read by its own text
encoder; beside it what rounding the original UNet's weights to bfloat16 does. ``scorers`` and ``evaluators``: on the
shipped validation and test pairs (edits: on rendered ones), the correlation of scores, how often both prefer the same
picture, and accuracy on decisive labels. An evaluator judges both pictures at one noise level with the same noise; one
that knows only what a guidance scale is worth compares two scales.

The originals are in the repository's history: ``git archive 9ec37a6 diffusion_align/scenes/assets | tar x -C DIR``.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.data import PairDataset, load_pairs
from diffusion_align.evaluation.accuracy import pairwise_accuracy
from diffusion_align.guidance.judges.evaluator import LatentEvaluator, load_evaluator
from diffusion_align.pictures import decoded_picture
from diffusion_align.process.levels import log_snr
from diffusion_align.rewards import RewardScorer, load_scorer, score_in_batches
from diffusion_align.rewards.factory import load_trained
from diffusion_align.rewards.preprocess import to_pixels
from diffusion_align.rewards.trained.pal import PALScorer
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.scenes.make.edits import edit_rows
from diffusion_align.shipped import SHIPPED, SHIPPED_SCORERS, asset_folder
from diffusion_align.training.engine.randomness import NOISE, TIMESTEP, generators, normal

from ..harness import write_result
from .base_quality import holes

Scores = NDArray[np.float32]

#: Pipelines with packed weights, and evaluators with the pipeline whose latents they judge.
PIPELINES = ("scenes-sd", "scenes-inpaint", "scenes-uneven")
EVALUATORS = {
    "scenes-sdxl-evaluator": "scenes-sdxl",
    "scenes-sd-evaluator": "scenes-sd",
    "scenes-uneven-evaluator": "scenes-uneven",
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks shipped-weights", description=__doc__)
    parser.add_argument("--originals", type=Path, required=True, help="folder of the assets before they were packed")
    parser.add_argument("--prompts", type=int, default=250, help="of predictions")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    pairs = shipped_pairs()
    result = {
        "bytes": {
            name: [stored(args.originals / name), stored(asset_folder(name))]
            for name in SHIPPED
            if (args.originals / name).is_dir()  # not what was packed from the start
        },
        "predictions": {name: prediction_error(name, args.originals / name, args.prompts) for name in PIPELINES},
        "scorers": {name: compare_scorers(name, args.originals, pairs) for name in SHIPPED_SCORERS},
        "evaluators": {
            name: compare_evaluators(name, args.originals / name, load_adapter(model), pairs)
            for name, model in EVALUATORS.items()
        },
    }
    write_result("shipped_weights", result, args.out)


def stored(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@torch.no_grad()
def prediction_error(name: str, original: Path, count: int) -> dict[str, float]:
    """||prediction - original's|| / ||original's||, over levels spread evenly, one for each of ``count`` prompts."""
    prompts = held_out_prompts(count)
    exact, packed = load_adapter(original), load_adapter(name)
    scenes, masks = holes(prompts, 0)
    x0 = exact.encode_images(scenes * 2 - 1)
    inpaint = exact.encode_inpaint(scenes * 2 - 1, masks) if exact.is_inpainting else None
    t = torch.linspace(0, exact.path.num_timesteps - 1, count).long()
    x_t = exact.path.noise(x0, normal(torch.arange(count), NOISE, x0.shape[1:]), t)

    def predict(adapter: Adapter) -> Tensor:
        cond = adapter.encode_prompts(prompts)
        return adapter.predict(x_t, t, replace(cond, inpaint=inpaint)).output

    true = predict(exact)
    rounded = copy.deepcopy(exact)
    for weight in rounded.unet.parameters():
        weight.data = weight.data.bfloat16().float()
    return {
        "prompts": count,
        "packed": float((predict(packed) - true).norm() / true.norm()),
        "bfloat16_unet": float((predict(rounded) - true).norm() / true.norm()),
    }


@dataclass(frozen=True)
class JudgedPairs:
    """N pairs of pictures: two times N pictures, N prompts, P(first preferred) (N,), and what else scores need."""

    sides: tuple[list[Image.Image], list[Image.Image]]
    prompts: list[str]
    labels: NDArray[np.float64]
    context: dict[str, Any] = field(default_factory=dict)


def shipped_pairs() -> JudgedPairs:
    """The shipped validation and test pairs, the chosen picture first."""
    records = []
    for split in ("validation", "test"):
        pairs = load_pairs("scenes-pairs", split, keep_ties=True)
        assert isinstance(pairs, PairDataset)
        records += [pairs[i] for i in range(len(pairs))]
    first, second = zip(*(record.images() for record in records), strict=True)
    labels = np.array([record.preference for record in records])
    return JudgedPairs(([*first], [*second]), [record.caption for record in records], labels)


def edit_pairs(count: int) -> JudgedPairs:
    """Rendered attempts at ``count`` edits."""
    rows = edit_rows(count, 47)
    first, second, sources = ([picture(row[key]) for row in rows] for key in ("jpg_0", "jpg_1", "source"))
    prompts = [row["caption"] for row in rows]
    labels = np.array([row["label_0"] for row in rows])
    return JudgedPairs((first, second), prompts, labels, {"source_images": sources, "instructions": prompts})


def picture(content: bytes) -> Image.Image:
    """An encoded picture, decoded."""
    return decoded_picture(content, "a stored picture")


def compare_scorers(name: str, originals: Path, pairs: JudgedPairs) -> dict[str, Any]:
    """Original and packed scorer on both pictures of every pair."""
    exact, packed = load_trained(str(originals / name)).frozen(), load_scorer(name)
    if isinstance(exact, PALScorer):
        exact.clip = load_trained(str(originals / exact.clip_name)).frozen()
        users = [exact.users[i % len(exact.users)] for i in range(len(pairs.prompts))]
        pairs = replace(pairs, context={"users": users})
    if "source_images" in exact.needs:
        pairs = edit_pairs(len(pairs.prompts))

    def scores(scorer: RewardScorer) -> Scores:
        return np.stack(
            [score_in_batches(scorer, side, pairs.prompts, **pairs.context).reward.numpy() for side in pairs.sides]
        )

    before, after = scores(exact), scores(packed)
    accuracies = {
        when: pairwise_accuracy(values[0] - values[1], pairs.labels)
        for when, values in (("accuracy_before", before), ("accuracy", after))
    }
    return {"pairs": len(pairs.labels), "decisive": int((pairs.labels != 0.5).sum()), **agreement(before, after)} | (
        # PAL's users are others than those who judged the shipped pairs.
        {} if isinstance(exact, PALScorer) else accuracies
    )


@torch.no_grad()
def compare_evaluators(name: str, original: Path, adapter: Adapter, pairs: JudgedPairs) -> dict[str, Any]:
    """Original and packed evaluator on pairs of noisy latents, or on two guidance scales if it knows only "value"."""
    count = len(pairs.prompts)
    seeds = torch.arange(count)
    t = adapter.path.draw_times(generators(seeds, TIMESTEP), 0, adapter.path.num_timesteps)
    latents = [adapter.encode_images(to_pixels(side, "pairs") * 2 - 1) for side in pairs.sides]
    noise = normal(seeds, NOISE, latents[0].shape[1:])
    noisy = [adapter.path.noise(x0, noise, t) for x0 in latents]
    level, cond = log_snr(adapter.path.at(t).alpha_sq.flatten()), adapter.encode_prompts(pairs.prompts)
    exact, packed = LatentEvaluator.from_pretrained(original), load_evaluator(name)
    only_value = exact.kinds == ("value",)
    first, second = (torch.full((count,), scale if only_value else 3.5) for scale in (1.0, 3.5))
    views = ((noisy[0], first), (noisy[0] if only_value else noisy[1], second))
    found: dict[str, Any] = {}
    for kind in exact.kinds:
        before, after = (
            np.stack([judge.scores(x, level, cond, scale)[kind].numpy() for x, scale in views])
            for judge in (exact, packed)
        )
        found[kind] = {"pairs": count, **agreement(before, after)}
    return found


def agreement(before: Scores, after: Scores) -> dict[str, float]:
    """Of scores (2, N) of pairs: their correlation, and how often both put the same one first."""
    return {
        "correlation": float(np.corrcoef(before.ravel(), after.ravel())[0, 1]),
        "verdicts_equal": float(((before[0] > before[1]) == (after[0] > after[1])).mean()),
    }
