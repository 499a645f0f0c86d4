"""Preference pairs of the scenes world in the Pick-a-Pic layout: ``python -m diffusion_align.scenes.make.pairs OUT``.

Two images of the base model for each prompt, at guidance scales drawn per image, judged by a simulated user through a
Bradley-Terry draw on the oracle's aspects. This is oracle feedback: the only place where the oracle reaches training.
With ``--pictures`` others draw, too, or instead: the policy then learns from pictures that are not its base's own.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.devices import fast_autocast
from diffusion_align.files import write_parquet
from diffusion_align.pictures import decoded_picture
from diffusion_align.sampling.sampler import generate, to_uint8
from diffusion_align.scenes.held_out import draw_prompts
from diffusion_align.scenes.world.grammar import parse_prompt
from diffusion_align.scenes.world.imperfect import imperfect_picture
from diffusion_align.scenes.world.oracle import OracleScore, score_images
from diffusion_align.scenes.world.questions import near_miss
from diffusion_align.scenes.world.render import IMAGE_SIZE

GUIDANCE_SCALES = (2.0, 3.5, 5.0, 7.0)
#: Pictures that no model draws: rendered scenes, near misses and imperfect ones.
RENDERED = "rendered"
#: Who may draw: the model to be trained (``--model``), other models, the renderer.
SOURCES = ("own", "scenes-sd", "scenes-uneven", RENDERED)


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


@dataclass(frozen=True)
class Picture:
    """One picture to make: who draws it (a model's name or ``RENDERED``), at which guidance scale, from which seed."""

    source: str
    scale: float
    seed: int

    @property
    def label(self) -> str:
        """The column ``model_0`` or ``model_1``."""
        return "rendered scenes" if self.source == RENDERED else f"{self.source}, guidance {self.scale:g}"


def deal_sources(sources: Sequence[str], count: int, seed: int) -> list[str]:
    """Each of ``sources`` equally often (the first ones once more where ``count`` is no multiple), shuffled by seed.

    Both pictures of a pair may come from one source or from two, as in Pick-a-Pic.
    """
    if len(sources) == 1:
        return list(sources) * count
    order = np.random.default_rng([seed, len(sources)]).permutation(count)
    return [sources[i % len(sources)] for i in order]


def draw_pictures(
    adapter: Adapter, prompts: Sequence[str], pictures: Sequence[Picture], steps: int
) -> NDArray[np.uint8]:
    """What ``adapter`` draws, one picture (64, 64, 3) for each prompt."""
    images = np.empty((len(pictures), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for scale in GUIDANCE_SCALES:
        rows = [i for i, picture in enumerate(pictures) if picture.scale == scale]
        if not rows:
            continue
        drawn = generate(
            adapter,
            [prompts[i] for i in rows],
            num_inference_steps=steps,
            guidance_scale=scale,
            seeds=[pictures[i].seed for i in rows],
            batch_size=64,
        )
        images[rows] = to_uint8(drawn)
    return images


def render_pictures(prompts: Sequence[str], pictures: Sequence[Picture]) -> NDArray[np.uint8]:
    """Rendered scenes of the prompts and of near misses, with a model's mistakes (see ``imperfect.py``)."""
    images = np.empty((len(pictures), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        rng, spec = np.random.default_rng(picture.seed), parse_prompt(prompt)
        images[i] = imperfect_picture(spec, near_miss(spec, rng), rng)
    return images


def make_rows(
    load: Callable[[str], Adapter], sources: Sequence[str], prompts: Sequence[str], seed: int, steps: int = 20
) -> dict[str, list[Any]]:
    """Columns of Pick-a-Pic for one pair per prompt.

    Args:
        load: gives the model of a name.
        sources: who draws, all equally often: names of models, ``RENDERED``.
    """
    rng = np.random.default_rng(seed)
    doubled = [prompt for prompt in prompts for _ in range(2)]
    scales, dealt = rng.choice(GUIDANCE_SCALES, size=len(doubled)), deal_sources(sources, len(doubled), seed)
    pictures = [
        Picture(source, float(scale), seed * 1_000_003 + i)
        for i, (source, scale) in enumerate(zip(dealt, scales, strict=True))
    ]
    images = np.empty((len(doubled), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for source in sources:
        rows = [i for i, picture in enumerate(pictures) if picture.source == source]
        asked, chosen = [doubled[i] for i in rows], [pictures[i] for i in rows]
        images[rows] = (
            render_pictures(asked, chosen) if source == RENDERED else draw_pictures(load(source), asked, chosen, steps)
        )
    files = [encode_jpeg(image) for image in images]
    return label_rows(prompts, files, [picture.label for picture in pictures], seed, rng)


def label_rows(
    prompts: Sequence[str], files: Sequence[bytes], models: Sequence[str], seed: int, rng: np.random.Generator
) -> dict[str, list[Any]]:
    """Columns of Pick-a-Pic: pair i is files 2i and 2i + 1 as a user would see them, after JPEG.

    Args:
        models: what to say of who made each file.
    """
    seen = np.stack([decode_jpeg(file) for file in files])
    scores = score_images(seen, [prompt for prompt in prompts for _ in range(2)])
    columns: dict[str, list[Any]] = {}
    for i, prompt in enumerate(prompts):
        judgement = judge(scores[2 * i], scores[2 * i + 1], rng)
        row = _row(prompt, files[2 * i : 2 * i + 2], models[2 * i : 2 * i + 2], judgement, f"{seed}-{i}")
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def _row(prompt: str, files: Sequence[bytes], models: Sequence[str], judgement: Judgement, key: str) -> dict[str, Any]:
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
        "model_0": models[0],
        "model_1": models[1],
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


def make_pairs(out: Path, sources: Sequence[str], train: int, held_out: int, seed: int, steps: int) -> None:
    """Write the splits' parquet files into ``out``; ``held_out`` 0 leaves out validation and test.

    Args:
        sources: names of models, ``RENDERED``.
    """
    from datasets import Dataset

    load = cache(load_adapter)
    out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    with fast_autocast("cpu"):  # twice as fast, no visible difference
        for split, count, split_seed in split_sizes(train, held_out, seed):
            if count == 0:
                continue
            rows = make_rows(load, sources, draw_split(split, count, split_seed, seen), split_seed, steps)
            write_parquet(split_file(out, split), Dataset.from_dict(rows))
            ties = sum(label == 0.5 for label in rows["label_0"])
            print(f"{split}: {count} pairs, {ties} ties", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusion_align.scenes.make.pairs", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for train/validation/test parquet files")
    parser.add_argument("--model", default="scenes-sdxl", help="model that draws its own pictures")
    parser.add_argument(
        "--pictures",
        nargs="+",
        choices=SOURCES,
        default=["own"],
        help="who draws, all equally often, dealt at random: own (--model), other models, rendered (scenes, near "
        "misses and imperfect ones)",
    )
    parser.add_argument("--train", type=int, default=1000, help="training pairs")
    parser.add_argument("--held-out", type=int, default=250, help="validation and test pairs, each; 0: only train")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps of the models' pictures")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args(argv)
    sources = [args.model if name == "own" else name for name in args.pictures]
    if len(set(sources)) < len(sources):
        parser.error(f"--pictures {' '.join(args.pictures)}: expected each of them once (own is {args.model})")
    make_pairs(args.out, sources, args.train, args.held_out, args.seed, args.steps)


if __name__ == "__main__":
    main()
