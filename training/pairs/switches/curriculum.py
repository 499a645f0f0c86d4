"""Curriculum-DPO (2405.13637): the surest pairs first, then more and more of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_align.data import CachedPairs, PairDataset, StreamedPairs
from diffusion_align.data.reading.rows import preference

from ..config import DPOConfig
from ..loading import Pairs


class Curriculum:
    """Which pair stands at a position of a run's endless sequence.

    The data are cut into ``chunks`` shares of equal size by falling gap. For ``length`` positions the first share is
    shuffled over and over; for the next ``length`` the first two, and so on; from then on all.

    Args:
        gaps: how sure each pair is, (pairs,); equal ones are ordered by the seed.
        length: positions before the next share is added.

    Raises:
        ValueError: all pairs are equally sure, or there are fewer pairs than shares.
    """

    def __init__(self, gaps: NDArray[np.float64], chunks: int, length: int, seed: int) -> None:
        if len(gaps) < chunks:
            raise ValueError(f"curriculum_chunks = {chunks}: there are {len(gaps)} pairs only")
        if np.ptp(gaps) == 0:
            raise ValueError(
                "curriculum label orders pairs by their soft labels, and these are all the same: label them with a "
                "scorer (diffusion-align data relabel --temperature), or set curriculum to none"
            )
        self.chunks, self.length, self.seed = chunks, length, seed
        shuffled = np.random.default_rng([seed, 3]).permutation(len(gaps))
        self.surest = shuffled[np.argsort(-gaps[shuffled], kind="stable")]
        self.permutation = lru_cache(maxsize=4)(self._permutation)

    def share(self, chunk: int) -> NDArray[np.intp]:
        """The pairs that are used when ``chunk`` (from 0) was added last."""
        return self.surest[: -(-len(self.surest) * (chunk + 1) // self.chunks)]

    def __call__(self, position: int) -> int:
        """The pair at ``position``."""
        chunk = min(position // self.length, self.chunks - 1)
        epoch, place = divmod(position - chunk * self.length, len(self.share(chunk)))
        return int(self.permutation(chunk, epoch)[place])

    def _permutation(self, chunk: int, epoch: int) -> NDArray[np.intp]:
        return np.random.default_rng([self.seed, 4, chunk, epoch]).permutation(self.share(chunk))


def label_gaps(pairs: PairDataset | CachedPairs) -> NDArray[np.float64]:
    """|2 p - 1| of every pair, which is 1 of a sure verdict."""
    if isinstance(pairs, CachedPairs):
        found: list[Any] = [pair["preference"] for pair in pairs.pairs]
    else:
        rows = pairs.cheap_columns().to_pylist()
        found = [preference(row, pairs.key(index)) for index, row in enumerate(rows)]
    return np.abs(2 * np.array(found, dtype=np.float64) - 1)


def build_curriculum(config: DPOConfig, pairs: Pairs, world_size: int) -> Curriculum | None:
    """The order that the settings ask for; None: the loader's own."""
    if config.curriculum == "none":
        return None
    assert not isinstance(pairs, StreamedPairs)  # the settings refuse it
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    return Curriculum(label_gaps(pairs), config.curriculum_chunks, config.curriculum_steps * step, config.seed)
