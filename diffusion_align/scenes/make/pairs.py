"""Preference pairs of the scenes world in the Pick-a-Pic layout: ``python -m diffusion_align.scenes.make.pairs OUT``.

Two images of the base model for each prompt, at guidance scales drawn per image, judged by a simulated user through a
Bradley-Terry draw on the oracle's aspects. This is oracle feedback: the only place where the oracle reaches training.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.devices import fast_autocast
from diffusion_align.pictures import decoded_picture
from diffusion_align.sampling.sampler import generate, to_uint8
from diffusion_align.scenes.held_out import draw_prompts
from diffusion_align.scenes.world.oracle import OracleScore, score_images

GUIDANCE_SCALES = (2.0, 3.5, 5.0, 7.0)


@dataclass(frozen=True)
class User:
    """Weights of the oracle's aspects in a simulated user's taste, and how often this user judges."""

    prompt_following: float
    aesthetic: float
    fidelity: float
    share: float

    def utility(self, score: OracleScore) -> float:
        """How much the user likes an image."""
        return (
            self.prompt_following * score.prompt_following
            + self.aesthetic * score.aesthetic
            + self.fidelity * score.fidelity
        )


#: Who judges: people who nearly agree (the shipped pairs), and people of opposed tastes (for PAL).
POPULATIONS: Mapping[str, Mapping[str, User]] = MappingProxyType(
    {
        "similar": {
            "balanced": User(1 / 3, 1 / 3, 1 / 3, share=0.4),
            "literal": User(0.60, 0.25, 0.15, share=0.2),
            "aesthete": User(0.20, 0.65, 0.15, share=0.2),
            "craftsman": User(0.25, 0.25, 0.50, share=0.2),
        },
        "opposed": {
            "classicist": User(0.20, 0.70, 0.10, share=0.3),
            "rebel": User(0.20, -0.70, 0.10, share=0.3),
            "literal": User(0.80, 0.10, 0.10, share=0.2),
            "craftsman": User(0.20, 0.10, 0.70, share=0.2),
        },
    }
)

#: Utility difference at which a user picks the better image with odds e : 1.
TEMPERATURE = 0.03
#: Utility differences below this are called a tie.
TIE_MARGIN = 0.015


@dataclass(frozen=True)
class Judgement:
    """``label_0`` is 1 (first image preferred), 0 or 0.5 (tie)."""

    user: str
    label_0: float


def verdict(gap: float, temperature: float, rng: np.random.Generator, votes: int = 1) -> float:
    """P(first) = sigmoid(gap / temperature) drawn: the share of ``votes`` for the first, or 0.5 where the difference is
    too small to see."""
    if abs(gap) < TIE_MARGIN * temperature / TEMPERATURE:
        return 0.5
    return float((rng.random(votes) < 1 / (1 + np.exp(-gap / temperature))).mean())


def judge(first: OracleScore, second: OracleScore, rng: np.random.Generator, population: str = "similar") -> Judgement:
    """The verdict of a random user of ``population`` (key of ``POPULATIONS``)."""
    users = POPULATIONS[population]
    name = str(rng.choice(list(users), p=[user.share for user in users.values()]))
    gap = users[name].utility(first) - users[name].utility(second)
    return Judgement(name, verdict(gap, TEMPERATURE, rng))


def split_sizes(train: int, held_out: int, seed: int) -> list[tuple[str, int, int]]:
    """Name, size and seed of each split of a data set."""
    return [("train", train, seed), ("validation", held_out, seed + 1), ("test", held_out, seed + 2)]


def draw_split(split: str, count: int, seed: int, seen: set[str]) -> list[str]:
    """Prompts of a split, added to ``seen``.

    Validation and test prompts never occur in training; a quarter of them needs colour-shape pairs never seen there.
    """
    prompts = draw_prompts(count, 0.0 if split == "train" else 0.25, seed, seen)
    seen.update(prompts)
    return prompts


def split_file(folder: Path, split: str) -> Path:
    """Where a split's rows lie in a data set's folder."""
    return folder / f"{split}-00000-of-00001.parquet"


def make_rows(adapter: Adapter, prompts: Sequence[str], seed: int, steps: int = 20) -> dict[str, list[Any]]:
    """Columns of Pick-a-Pic for one pair per prompt."""
    rng = np.random.default_rng(seed)
    doubled = [prompt for prompt in prompts for _ in range(2)]
    scales = rng.choice(GUIDANCE_SCALES, size=len(doubled))
    images = np.empty((len(doubled), 64, 64, 3), np.uint8)
    for scale in GUIDANCE_SCALES:
        rows = np.flatnonzero(scales == scale)
        drawn = generate(
            adapter,
            [doubled[i] for i in rows],
            num_inference_steps=steps,
            guidance_scale=scale,
            seeds=[seed * 1_000_003 + int(i) for i in rows],
            batch_size=64,
        )
        images[rows] = to_uint8(drawn)
    files = [encode_jpeg(image) for image in images]
    return label_rows(prompts, files, scales, seed, rng)


def label_rows(
    prompts: Sequence[str], files: Sequence[bytes], scales: NDArray[np.float64], seed: int, rng: np.random.Generator
) -> dict[str, list[Any]]:
    """Columns of Pick-a-Pic: pair i is files 2i and 2i + 1 as a user would see them, after JPEG."""
    seen = np.stack([decode_jpeg(file) for file in files])
    scores = score_images(seen, [prompt for prompt in prompts for _ in range(2)])
    columns: dict[str, list[Any]] = {}
    for i, prompt in enumerate(prompts):
        judgement = judge(scores[2 * i], scores[2 * i + 1], rng)
        row = _row(prompt, files[2 * i : 2 * i + 2], scales[2 * i : 2 * i + 2], judgement, f"{seed}-{i}")
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def _row(
    prompt: str, files: Sequence[bytes], scales: NDArray[np.float64], judgement: Judgement, key: str
) -> dict[str, Any]:
    uids = [hashlib.sha256(file).hexdigest()[:32] for file in files]
    label = judgement.label_0
    return {
        "are_different": files[0] != files[1],
        "best_image_uid": "none" if label == 0.5 else uids[0 if label == 1 else 1],
        "caption": prompt,
        "has_label": True,
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "jpg_0": files[0],
        "jpg_1": files[1],
        "label_0": label,
        "label_1": 1 - label,
        "model_0": f"scenes-sdxl, guidance {scales[0]:g}",
        "model_1": f"scenes-sdxl, guidance {scales[1]:g}",
        "num_example_per_prompt": 1,
        "ranking_id": key,
        "user_id": judgement.user,
    }


def decode_jpeg(file: bytes) -> NDArray[np.uint8]:
    """A stored picture as users and the oracle see it, (64, 64, 3)."""
    return np.array(decoded_picture(file, "a stored picture"))


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """JPEG without chroma subsampling, which would smear 64-pixel pictures."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def main() -> None:
    from datasets import Dataset

    parser = argparse.ArgumentParser(prog="python -m diffusion_align.scenes.make.pairs", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for train/validation/test parquet files")
    parser.add_argument("--model", default="scenes-sdxl", help="model that draws the pictures")
    parser.add_argument("--train", type=int, default=1000, help="training pairs")
    parser.add_argument("--held-out", type=int, default=250, help="validation and test pairs, each")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    adapter = load_adapter(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    with fast_autocast("cpu"):  # twice as fast, no visible difference
        for split, count, seed in split_sizes(args.train, args.held_out, args.seed):
            rows = make_rows(adapter, draw_split(split, count, seed, seen), seed)
            Dataset.from_dict(rows).to_parquet(split_file(args.out, split))
            ties = sum(label == 0.5 for label in rows["label_0"])
            print(f"{split}: {count} pairs, {ties} ties", flush=True)


if __name__ == "__main__":
    main()
