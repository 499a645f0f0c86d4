"""Options of ``data lists``. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_align.commands.options import Options


@dataclass(frozen=True)
class ListsOptions(Options):
    """Make ranked lists of pairs: those of one prompt that share pictures become one list, in the order that the
    majority of their verdicts says. For train dpo with a loss on lists."""

    counts: ClassVar[tuple[str, ...]] = ("shard_size",)

    source: str
    """Pairs: shipped or hub data set, parquet file or folder, or a folder with metadata.jsonl or metadata.csv (the flag
    may be left out if it comes first)."""
    out: str
    """Folder for the lists, with their pictures; give it as --dataset."""
    scorer: str | None = None
    """Scorer that orders pictures whose verdicts make a circle (A over B over C over A) and that have won as often;
    unset leaves such lists out."""
    checkpoint: str | None = None
    """Weights file or folder of the scorer instead of the published ones."""
    split: str = "train"
    """Split of the data set."""
    shard_size: int = 1000
    """Lists of a file."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes a GPU where there is one."""

    def check(self) -> None:
        super().check()
        if self.checkpoint is not None and self.scorer is None:
            raise ValueError("--checkpoint is the scorer's: add --scorer")
