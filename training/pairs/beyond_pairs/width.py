"""What an example of a data set is, for plans and for the estimate of memory: nothing of it is read but columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import DenoisingConfig


@dataclass(frozen=True)
class Width:
    """An example.

    Attributes:
        name: "pair", "picture", "list".
        pictures: that the network sees of it.
    """

    name: str
    pictures: int


def example_width(config: DenoisingConfig, list_size: int | None = None) -> Width:
    """What ``config.dataset`` holds, where it is on this disk; else a pair."""
    return _found(config.dataset, config.dataset_split, config.units, list_size)


@lru_cache(maxsize=8)
def _found(dataset: str, split: str, units: tuple[str, ...], list_size: int | None) -> Width:
    from diffusion_align.data.pairs import local_unit

    unit, longest = local_unit(dataset, split)
    if unit not in units or unit == "pairs" or unit is None:
        return Width("pair", 2)
    if unit == "labelled pictures":
        return Width("picture", 1)
    return Width("list", longest if list_size is None else min(list_size, longest))
