"""Positions in the data: in pairs, whatever the batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest

from diffusion_align.data.loader import ExampleLoader


class Numbers:
    """Forty examples, which are their own numbers, in pictures of one or more sizes."""

    def __init__(self, sides: int = 1) -> None:
        self.sides = sides

    def __len__(self) -> int:
        return 40

    def example(self, index: int, seed: int, drop_caption: bool) -> int:
        return index

    def sizes(self) -> list[tuple[int, int]]:
        return [(8 + i % self.sides, 8) for i in range(len(self))]


def with_seeds(examples: Sequence[int], seeds: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(examples, seeds, strict=True))


@pytest.mark.parametrize(("size", "world"), [(8, 1), (2, 1), (3, 1), (2, 2)])
def test_other_batches_go_on_where_the_last_ones_ended(size: int, world: int) -> None:
    """No pair of the epoch is left out or seen twice, and each has the seed of its position."""

    def loader(batch_size: int, rank: int = 0, world_size: int = 1) -> ExampleLoader[int, list[tuple[int, int]]]:
        return ExampleLoader(Numbers(), batch_size, with_seeds, rank=rank, world_size=world_size)

    expected = [pair for batch in islice(loader(1), 52) for pair in batch]
    first = loader(4)
    seen = [pair for batch in islice(first, 6) for pair in batch]
    ranks = [loader(size, rank, world) for rank in range(world)]
    for own in ranks:
        own.load_state_dict(first.state_dict())
    for batches in islice(zip(*ranks, strict=True), 24 // size // world):
        seen += [pair for batch in batches for pair in batch]
    assert seen == expected[:48]
    again = loader(4)
    again.load_state_dict(ranks[0].state_dict())
    assert next(iter(again)) == expected[48:]


def test_batches_of_several_sizes_keep_their_number() -> None:
    state = ExampleLoader(Numbers(sides=2), 4, with_seeds).state_dict()
    with pytest.raises(ValueError, match="batches have 4 pairs, this run's 2: with aspect_ratio_buckets"):
        ExampleLoader(Numbers(sides=2), 2, with_seeds).load_state_dict(state)
    ExampleLoader(Numbers(sides=2), 2, with_seeds, world_size=2).load_state_dict(state)
