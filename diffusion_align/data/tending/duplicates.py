"""Pictures that are the same: to the byte (SHA-256), or nearly, by a hash of how brightness changes along rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

from diffusion_align.pictures import decoded_picture

from ..beyond_pairs.aggregation import connected

#: Bits of a hash by which copies of a picture (another size, another JPEG quality) differ at most.
NEAR = 4
#: Hashes that differ in at most NEAR bits agree in at least one of so many pieces.
PIECES = NEAR + 1


def content_hash(content: bytes) -> str:
    """SHA-256 of an encoded picture."""
    return hashlib.sha256(content).hexdigest()


def difference_hash(content: bytes, where: str) -> int:
    """64 bits: whether each pixel of the picture, as 9 x 8 grey ones, is darker than the one to its right.

    Raises:
        CorruptImageError: it cannot be decoded.
    """
    return picture_hash(decoded_picture(content, where))


def picture_hash(picture: Image.Image) -> int:
    """As ``difference_hash``, of a decoded picture."""
    grey = picture.convert("L").resize((9, 8), Image.Resampling.LANCZOS)
    values = np.asarray(grey, dtype=np.int16)
    return int.from_bytes(np.packbits(values[:, 1:] > values[:, :-1]).tobytes(), "big")


def near_pairs(hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Places (i < j) of hashes that differ in at most ``NEAR`` bits, each pair of places once."""
    bounds = [64 * piece // PIECES for piece in range(PIECES + 1)]
    seen: set[tuple[int, int]] = set()
    for low, high in pairwise(bounds):
        groups: dict[int, list[int]] = {}
        for place, value in enumerate(hashes):
            piece = (value >> low) & ((1 << (high - low)) - 1)
            for other in groups.get(piece, ()):
                if (hashes[other] ^ value).bit_count() <= NEAR and (other, place) not in seen:
                    seen.add((other, place))
                    yield other, place
            groups.setdefault(piece, []).append(place)


def groups_of(count: int, pairs: Iterator[tuple[int, int]]) -> list[int]:
    """For each of ``count`` places the first place that it is connected to by ``pairs``."""
    first = {place: group[0] for group in connected(count, pairs) for place in group}
    return [first[place] for place in range(count)]
