"""Options of ``cache verify`` and ``cache gc``. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion_align.commands.options import Options


@dataclass(frozen=True)
class VerifyCacheOptions(Options):
    """Check a cache: every shard's size, checksum and contents; with --data, also every row and picture of its data.

    Exit status: 0 it is whole, 1 it is damaged or of other data, or there is no finished cache, 2 bad input.
    """

    folder: str
    """The cache's folder (the flag may be left out if it comes first)."""
    data: bool = False
    """Compare it with the data set that it was made of: rows, captions, labels, weights and all pictures' bytes."""
    dataset: str | None = None
    """Where that data set is now, if it has moved (with --data)."""

    def check(self) -> None:
        super().check()
        if self.dataset is not None and not self.data:
            raise ValueError("--dataset says where the data set of --data is: add --data")


@dataclass(frozen=True)
class CollectCacheOptions(Options):
    """Remove files that the manifest does not name: of an earlier data set or model, and what unfinished builds left.

    Exit status: 0 done, 1 there is no finished cache, whose files are needed to finish it, 2 bad input.
    """

    folder: str
    """The cache's folder (the flag may be left out if it comes first)."""
    dry_run: bool = False
    """Only say what would be removed."""
