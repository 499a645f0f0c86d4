"""Rendered scenes with captions, as one array on disk."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..grammar import sample_prompt, sample_scene
from ..render import render


@dataclass(frozen=True)
class Corpus:
    """``images`` (N, 64, 64, 3) uint8 and their ``captions``."""

    images: NDArray[np.uint8]
    captions: list[str]


def _render_chunk(job: tuple[int, int]) -> tuple[NDArray[np.uint8], list[str]]:
    seed, count = job
    rng = np.random.default_rng(seed)
    images, captions = [], []
    for _ in range(count):
        spec = sample_prompt(rng)
        images.append(render(sample_scene(spec, rng)))
        captions.append(spec.text())
    return np.stack(images), captions


def make_corpus(folder: Path, count: int, seed: int, workers: int = 2, chunk: int = 500) -> None:
    """Render ``count`` scenes into ``folder`` (images.npy, captions.json); the result depends on ``seed`` only."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(seed * 1_000_003 + i, min(chunk, count - start)) for i, start in enumerate(range(0, count, chunk))]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_render_chunk, jobs)
    np.save(folder / "images.npy", np.concatenate([images for images, _ in parts]))
    (folder / "captions.json").write_text(json.dumps([c for _, captions in parts for c in captions]))


def load_corpus(folder: Path) -> Corpus:
    images = np.load(folder / "images.npy", mmap_mode="r")
    return Corpus(images, json.loads((folder / "captions.json").read_text()))
