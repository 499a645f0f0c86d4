"""A few fixed draws of randomness for each pair, in place of fresh randomness at every visit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class FixedDraws:
    """Seeds that follow from (run, pair, draw) and from nothing else.

    What is drawn from them - timestep, noise, posterior sample, flip, crop, dropped caption - is the same whenever a
    pair meets the same draw, whatever the epoch, batch, process or latent cache.

    Attributes:
        seed: of the run.
        count: D, draws of each pair.
    """

    seed: int
    count: int

    def of_visit(self, key: str, visit: int) -> int:
        """The int64 seed that pair ``key`` gets at the visit whose own seed is ``visit``: one of its D, at random."""
        return self.of_draw(key, visit % self.count)

    def of_draw(self, key: str, draw: int) -> int:
        """The int64 seed of draw 0 .. D - 1 of the pair."""
        digest = hashlib.blake2b(f"{self.seed}:{key}:{draw}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def which(self, key: str, seed: int) -> int:
        """The draw that ``seed`` belongs to.

        Raises:
            ValueError: it is no draw of this pair.
        """
        for draw in range(self.count):
            if self.of_draw(key, draw) == seed:
                return draw
        raise ValueError(f"{key}: seed {seed} is none of the {self.count} draws of run seed {self.seed}")
