"""Options of ``diffusion-align evaluate scorer``. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_align.commands.options import Options


@dataclass(frozen=True, kw_only=True)
class EvaluateScorerOptions(Options):
    """How well scorers predict people's verdicts on pairs: accuracy with and without ties, by aspect, rankings of
    several pictures, calibration."""

    counts: ClassVar[tuple[str, ...]] = ("max_pairs", "batch_size")

    scorers: tuple[str, ...]
    """Names (docs/rewards.md) or folders of trained scorers (the flag may be left out if they come first)."""
    dataset: str
    """Judged pairs: shipped or hub data set, parquet file or folder, in Pick-a-Pic's columns."""
    split: str = "test"
    """Split of the data set."""
    validation_split: str | None = None
    """Split that the threshold for ties is chosen on; unset: the pairs themselves, which flatters (and is said)."""
    max_pairs: int | None = None
    """Only so many pairs, drawn at random."""
    seed: int = 0
    """What they are drawn with."""
    batch_size: int = 32
    """Pairs scored at once."""
    out: str | None = None
    """Folder for table.json and report.html with the calibration curves; unset: none is written."""
    overwrite: bool = False
    """Replace the files of an earlier evaluation in --out."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes a GPU where there is one."""

    def check(self) -> None:
        super().check()
        if not self.scorers:
            raise ValueError(
                "evaluate scorer: name at least one scorer, e.g. evaluate scorer pickscore --dataset PAIRS"
            )
