"""Ranked lists of the embedded world: pictures of the base as in the shipped pairs, ranked by the same users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from diffusion_align.adapters import Adapter
from diffusion_align.data import PairDataset, load_pairs
from diffusion_align.files import write_parquet
from diffusion_align.scenes.make.pairs import (
    GUIDANCE_SCALES,
    POPULATIONS,
    TEMPERATURE,
    Picture,
    draw_pictures,
    encode_jpeg,
)
from diffusion_align.scenes.world.oracle import OracleScore, score_images

#: Pictures of a list; half as many lists as there are pairs have as many pictures.
PICTURES = 4
SEED = 77


def make_lists(adapter: Adapter, folder: Path, count: int, steps: int = 20) -> Path:
    """Write ``count`` lists, of the first training prompts, unless they are there.

    Guidance scales are drawn per picture. A user ranks by utility / temperature plus Gumbel noise, which is a draw of
    Plackett and Luce: any two pictures of it are compared as Bradley and Terry's, as in the pairs.
    """
    path = folder / f"train-{count}.parquet"
    if path.is_file():
        return path
    pairs = load_pairs("scenes-pairs", "train", keep_ties=True)
    assert isinstance(pairs, PairDataset)
    prompts = [prompt for prompt in pairs.captions()[:count] for _ in range(PICTURES)]
    rng = np.random.default_rng(SEED)
    scales = rng.choice(GUIDANCE_SCALES, size=len(prompts))
    pictures = [Picture("own", float(scale), SEED * 1_000_003 + row) for row, scale in enumerate(scales)]
    images = draw_pictures(adapter, prompts, pictures, steps)
    scores = score_images(images, prompts)
    columns: dict[str, list[Any]] = {"images": [], "caption": [], "ranks": []}
    for first in range(0, len(prompts), PICTURES):
        columns["images"].append([encode_jpeg(image) for image in images[first : first + PICTURES]])
        columns["caption"].append(prompts[first])
        columns["ranks"].append(ranked(scores[first : first + PICTURES], rng))
    write_parquet(path, Dataset.from_dict(columns))
    return path


def ranked(scores: list[OracleScore], rng: np.random.Generator) -> list[int]:
    """Places of the pictures, 0 the best, by a random user."""
    users = list(POPULATIONS["similar"].values())
    user = users[rng.choice(len(users), p=[user.share for user in users])]
    liked = np.array([user.utility(score) for score in scores]) / TEMPERATURE + rng.gumbel(size=len(scores))
    return [int(place) for place in (-liked).argsort().argsort()]
