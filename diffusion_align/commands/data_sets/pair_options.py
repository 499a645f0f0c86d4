"""Options of the commands that tend data sets of pairs. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusion_align.commands.options import Options


@dataclass(frozen=True)
class ImportOptions(Options):
    """Read a published preference set, or another program's folder, and write pairs that runs read.

    Archives (zip, tar, also in parts) are read where they lie; scripts of a data set are never run.
    """

    counts: ClassVar[tuple[str, ...]] = ("limit", "shard_size")

    source: str
    """Folder of the set; for pickapic also a file or a hub name (the flag may be left out if it comes first)."""
    out: str
    """Folder for the pairs; give it as --dataset. An import that died goes on there."""
    format: Literal["auto", "pickapic", "rapidata", "image-preferences", "imagerewarddb", "hpdv2", "hpdv3", "invoke",
                    "w-l", "chosen-rejected", "suffixes"] = "auto"  # fmt: skip
    """What it is; auto looks at the folder."""
    split: str = "train"
    """Split of the set; the written files are named after it."""
    rank_best: Literal["lowest", "highest"] | None = None
    """What the best picture's rank is, where the set does not say so (HPDv2's test split): without it, a few are shown
    and nothing is written."""
    soft_labels: bool = False
    """Of sets with votes: add soft_label_0, the share of votes for picture 0, which loss_type sigmoid learns from."""
    limit: int | None = None
    """Only so many pairs, the first."""
    max_missing: int = 0
    """Pairs whose pictures are not there that may be left out and counted."""
    shard_size: int = 1000
    """Pairs of a file."""


@dataclass(frozen=True)
class PairSetOptions(Options):
    """A split of a data set of pairs."""

    source: str
    """Pairs: shipped or hub data set, parquet file or folder, or a folder with metadata.jsonl or metadata.csv (the flag
    may be left out if it comes first)."""
    split: str = "train"
    """Split of the data set."""


@dataclass(frozen=True, kw_only=True)
class PairExportOptions(PairSetOptions):
    """Write pairs for other programs; what these cannot hold (ties, soft labels, weights) is counted."""

    out: str
    """Folder to write; must be new or empty."""
    format: Literal["pickapic", "w-l", "chosen-rejected", "metadata"] = "pickapic"
    """pickapic: parquet; w-l: folders w and l (sd-scripts); chosen-rejected: the same names (OneTrainer); metadata:
    metadata.jsonl beside pictures."""
    merge: Literal["majority", "annotators"] | None = None
    """Of a folder of the studio's labels: the majority of all annotators, with their votes (unset), or one row for each
    annotator, named in user_id."""


@dataclass(frozen=True)
class CheckOptions(Options):
    """Look for torn pictures, prompts and pictures that two splits share, repeated and contradicting pairs.

    Exit status 1: a picture is torn, or a split leaks into another.
    """

    source: str
    """Pairs, as for data stats (the flag may be left out if it comes first)."""
    splits: tuple[str, ...] = ("train", "validation", "test")
    """Splits to look at, as far as there are."""
    decode: bool = True
    """Decode every picture."""


@dataclass(frozen=True, kw_only=True)
class DedupOptions(PairSetOptions):
    """Find pairs that say nothing new: equal pictures (SHA-256) or nearly equal ones (a 64-bit difference hash),
    repeated pairs, contradicting ones. With --out, write the others."""

    out: str | None = None
    """Folder for the pairs that stay; unset only tells."""
    near: bool = True
    """Nearly equal pictures (at most 4 of 64 bits differ) count as one, too."""


@dataclass(frozen=True, kw_only=True)
class StatsOptions(PairSetOptions):
    """Counts of a data set: labels, ties, prompts, people, models. Pictures are not read."""

    sizes: int = 0
    """Also tell the sizes of the pictures of so many pairs, by their headers."""

    def check(self) -> None:
        super().check()
        if self.sizes < 0:
            raise ValueError(f"--sizes {self.sizes}: expected at least 0")


@dataclass(frozen=True, kw_only=True)
class SplitOptions(PairSetOptions):
    """Part a data set into splits that share neither a prompt nor a picture."""

    out: str
    """Folder for train-, test- and validation-*.parquet; must be new or empty."""
    test: float = 0.1
    """Share of the prompts that becomes the test split; 0: none."""
    validation: float = 0.0
    """Share of the prompts that becomes the validation split; 0: none."""
    seed: int = 0
    """What prompts are drawn with."""

    def check(self) -> None:
        super().check()
        if self.test < 0 or self.validation < 0 or not 0 < self.test + self.validation < 1:
            raise ValueError(
                f"--test {self.test:g} --validation {self.validation:g}: expected shares that come to more than 0 and "
                "less than 1"
            )
