"""The order of a stream: parts of the data set that are spread evenly over it and shuffled, block after block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def spread_order(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The numbers 0 .. count - 1 in a random order whose every stretch is spread evenly over them.

    It is the van der Corput sequence in base 2 with Owen's nested scrambling ("Randomly permuted (t,m,s)-nets and
    (t,s)-sequences", 1995): among any 2^k that follow each other there is one of every 2^-k of the range, whose place
    is random; and each number is about as likely at each place.
    """
    bits = max(count - 1, 0).bit_length()
    numbers = np.arange(2**bits)
    prefix, found = np.zeros_like(numbers), np.zeros_like(numbers)
    for level in range(bits):
        flips = rng.integers(2, size=2**level)
        bit = (numbers >> level) & 1  # the lowest bit first: this turns the order of the bits round
        found = found << 1 | (bit ^ flips[prefix])
        prefix = prefix << 1 | bit
    return found[found < count]


def blocks(order: NDArray[np.int64], sizes: NDArray[np.int64], least: int) -> list[NDArray[np.int64]]:
    """``order`` cut wherever ``least`` rows are together; what is left at the end belongs to the last block.

    Args:
        order: numbers of parts.
        sizes: rows of each part, by its number.
    """
    cuts, together, left = [], 0, int(sizes[order].sum())
    for place, size in enumerate(sizes[order].tolist(), start=1):
        together, left = together + size, left - size
        if together >= least and left >= least:
            cuts.append(place)
            together = 0
    return [part for part in np.split(order, cuts) if len(part)]
