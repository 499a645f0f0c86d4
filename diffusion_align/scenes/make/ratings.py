"""Rated repaintings for training inpainting scorers: ``python -m diffusion_align.scenes.make.ratings OUT``.

As PrefPaint's data (2410.21966): three repaintings of every hole, each given 0 to 7 points for its structure, its local
texture and the overall feeling. Here the raters are simulated: a criterion is what the oracle says, seen through a
rater's severity and noise, in whole points.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.data.holes import load_holes
from diffusion_align.devices import fast_autocast
from diffusion_align.sampling.sampler import generate, to_uint8
from diffusion_align.scenes.world.oracle import OracleScore, score_image
from diffusion_align.scenes.world.render import IMAGE_SIZE
from diffusion_align.scenes.world.scene_holes import SceneHoles

from .pairs import draw_split, split_file, split_sizes

#: Repaintings of one hole.
PER_HOLE = 3
#: What each criterion sees of the oracle's aspects.
CRITERIA: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "structure": {"prompt_following": 0.5, "fidelity": 0.5},
        "texture": {"fidelity": 1.0},
        "overall": {"prompt_following": 1 / 3, "aesthetic": 1 / 3, "fidelity": 1 / 3},
    }
)
#: Standard deviations, in points, of a rater's severity (the same for a whole hole) and of each verdict.
SEVERITY, NOISE = 0.4, 0.5
HIGHEST = 7
#: Kinds of holes. Each repainting has a guidance scale and a number of steps of its own, to differ in quality.
HOLES = ("box", "brush", "half", "border")
SCALES = (1.0, 2.0, 5.0)
STEPS = (3, 6, 12)


def worth(score: OracleScore, criterion: str) -> float:
    """What a picture deserves, in [0, 1]."""
    return sum(share * float(getattr(score, aspect)) for aspect, share in CRITERIA[criterion].items())


def rated(scores: Sequence[OracleScore], rng: np.random.Generator) -> list[dict[str, float]]:
    """One rater's points, {"score_CRITERION": 0..7}, for the repaintings of one hole."""
    severity = rng.normal(0, SEVERITY)
    return [
        {
            f"score_{name}": float(
                np.clip(np.round(HIGHEST * worth(score, name) - severity + rng.normal(0, NOISE)), 0, HIGHEST)
            )
            for name in CRITERIA
        }
        for score in scores
    ]


def repaintings(adapter: Adapter, prompts: Sequence[str], seed: int) -> tuple[Any, NDArray[np.uint8]]:
    """A hole for each prompt (``Holes``), and its repaintings (PER_HOLE N, 64, 64, 3), those of one hole together."""
    rng = np.random.default_rng(seed)
    seeds = [seed * 1_000_003 + i for i in range(len(prompts))]
    tasks = load_holes(SceneHoles(len(prompts), seed, list(prompts)), range(len(prompts)), seeds, IMAGE_SIZE, HOLES)
    count = len(prompts) * PER_HOLE
    settings = list(zip(rng.choice(SCALES, count), rng.choice(STEPS, count), strict=True))
    images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE)
    encoded = tasks.encode(adapter).cpu()
    with fast_autocast("cpu"):
        for scale, steps in sorted(set(settings)):
            rows = [i for i, setting in enumerate(settings) if setting == (scale, steps)]
            holes = torch.tensor([i // PER_HOLE for i in rows])
            images[rows] = generate(
                adapter,
                [prompts[i] for i in holes],
                num_inference_steps=int(steps),
                guidance_scale=float(scale),
                seeds=[seed * 1_000_003 + i for i in rows],
                batch_size=64,
                inpaint=encoded[holes],
            )
    return tasks, to_uint8(tasks.repeat_each(PER_HOLE).composite(images))


def rating_rows(adapter: Adapter, prompts: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """PER_HOLE rated repaintings of one hole for each prompt; those of a hole are next to each other."""
    tasks, images = repaintings(adapter, prompts, seed)
    sources, masks = to_uint8(tasks.pictures), to_uint8(tasks.masks.expand(-1, 3, -1, -1))
    rows = []
    for i, prompt in enumerate(prompts):
        own = images[i * PER_HOLE : (i + 1) * PER_HOLE]
        points = rated([score_image(image, prompt) for image in own], np.random.default_rng([seed, i]))
        shared = {"source": encode_png(sources[i]), "mask": encode_png(masks[i]), "caption": prompt}
        rows += [{"image": encode_png(image), **shared, **given} for image, given in zip(own, points, strict=True)]
    return rows


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """PNG: outside of the hole a repainting is its original to the bit."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def main() -> None:
    from datasets import Dataset

    parser = argparse.ArgumentParser(prog="python -m diffusion_align.scenes.make.ratings", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for train/validation/test parquet files")
    parser.add_argument("--model", default="scenes-inpaint", help="inpainting model that repaints")
    parser.add_argument("--train", type=int, default=2000, help="holes to train on, three repaintings each")
    parser.add_argument("--held-out", type=int, default=250, help="holes of validation and test, each")
    parser.add_argument("--seed", type=int, default=71)
    args = parser.parse_args()
    adapter = load_adapter(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, count, seed in split_sizes(args.train, args.held_out, args.seed):
        rows = rating_rows(adapter, draw_split(split, count, seed, seen), seed)
        Dataset.from_list(rows).to_parquet(split_file(args.out, split))
        print(f"{split}: {len(rows)} rated repaintings of {count} holes", flush=True)


if __name__ == "__main__":
    main()
