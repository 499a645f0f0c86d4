"""Rendered scenes with captions, as one array on disk."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion_align.scenes.world.grammar import PromptSpec, Scene, sample_prompt, sample_scene
from diffusion_align.scenes.world.render import render

#: Seed of the corpus that the stages train on.
SEED = 1


@dataclass(frozen=True)
class Corpus:
    """``images`` (N, 64, 64, 3) uint8 and their ``captions``."""

    images: NDArray[np.uint8]
    captions: list[str]


def _scenes(job: tuple[int, int]) -> Iterator[tuple[PromptSpec, Scene]]:
    seed, count = job
    rng = np.random.default_rng(seed)
    for _ in range(count):
        spec = sample_prompt(rng)
        yield spec, sample_scene(spec, rng)


def _render_chunk(job: tuple[int, int]) -> tuple[NDArray[np.uint8], list[str]]:
    found = list(_scenes(job))
    return np.stack([render(scene) for _, scene in found]), [spec.text() for spec, _ in found]


def _jobs(count: int, seed: int, chunk: int) -> list[tuple[int, int]]:
    return [(seed * 1_000_003 + i, min(chunk, count - start)) for i, start in enumerate(range(0, count, chunk))]


def make_corpus(folder: Path, count: int, seed: int, workers: int = 2, chunk: int = 500) -> None:
    """Render ``count`` scenes into ``folder`` (images.npy, captions.json); the result depends on ``seed`` only."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(count, seed, chunk)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_render_chunk, jobs)
    np.save(folder / "images.npy", np.concatenate([images for images, _ in parts]))
    (folder / "captions.json").write_text(json.dumps([c for _, captions in parts for c in captions]))


def corpus_scenes(count: int, seed: int = SEED, chunk: int = 500) -> list[Scene]:
    """What the pictures of ``make_corpus`` show."""
    return [scene for job in _jobs(count, seed, chunk) for _, scene in _scenes(job)]


def load_corpus(folder: Path) -> Corpus:
    images = np.load(folder / "images.npy", mmap_mode="r")
    return Corpus(images, json.loads((folder / "captions.json").read_text()))
