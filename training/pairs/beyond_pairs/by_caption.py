"""Labelled pictures of one caption: neighbours in an epoch, and the same noise in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusion_align.data import CachedPairs

from ..loading import Pairs
from ..switches.config import check_order
from .config import TOGETHER, KTOConfig


class ByCaption:
    """Which picture stands at a position of a run's endless sequence: those of one caption stand together.

    Every epoch has the captions, and the pictures of each, in another order.

    Args:
        captions: of every picture.

    Raises:
        ValueError: no two pictures have the same one.
    """

    def __init__(self, captions: Sequence[str], seed: int) -> None:
        self.seed = seed
        self.groups = np.unique(np.array(captions), return_inverse=True)[1]
        if len(set(captions)) == len(captions):
            raise ValueError(
                f"shared_noise gives pictures of a caption the same noise, and no two of these {len(captions)} have "
                "the same: set shared_noise to false"
            )
        self.permutation = lru_cache(maxsize=4)(self._permutation)

    def __call__(self, position: int) -> int:
        """The picture at ``position``."""
        epoch, place = divmod(position, len(self.groups))
        return int(self.permutation(epoch)[place])

    def _permutation(self, epoch: int) -> NDArray[np.intp]:
        rng = np.random.default_rng([self.seed, 5, epoch])
        shuffled = rng.permutation(len(self.groups))
        turn = rng.permutation(self.groups.max() + 1)  # of each caption
        return shuffled[np.argsort(turn[self.groups[shuffled]], kind="stable")]


def build_order(config: KTOConfig, pairs: Pairs, world_size: int) -> ByCaption | None:
    """The order that ``shared_noise`` needs; None: the loader's own. The pictures of a pair are together as it is.

    Raises:
        ValueError: labelled pictures that cannot be ordered, or of which no two have the same caption.
    """
    if not config.shared_noise or pairs.unit != "labelled pictures":
        return None
    check_order(config, TOGETHER)  # what a data set of the hub holds, nobody knew before
    captions = [each["caption"] for each in pairs.pairs] if isinstance(pairs, CachedPairs) else pairs.captions()
    return ByCaption(captions, config.seed)


def seeds_by_caption(captions: Sequence[str | None], seeds: Tensor) -> Tensor:
    """Seeds (B,) of pictures: those with the same caption have the first one's.

    Pictures without a caption, or with an empty one, keep their own.
    """
    first: dict[str, int] = {}
    own = [first.setdefault(text, row) if text else row for row, text in enumerate(captions)]
    return seeds[own]
