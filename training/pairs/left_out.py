"""What of a data set is not used, or not as it is: counted, said once, and kept beside the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_align.adapters import Adapter
from diffusion_align.adapters.prompts import cut_prompts
from diffusion_align.data import PairLoader, StreamLoader
from diffusion_align.data.beyond_pairs.balance import Summary
from diffusion_align.evaluation.report import Report

if TYPE_CHECKING:
    from .loading import Pairs

COUNTS = "data.json"


@dataclass(frozen=True)
class LeftOut:
    """What the pairs of a run are, and what is left out.

    Attributes:
        name: of the data set.
        counts: rows, and how many were left out and why.
        used: pairs; None for data sets on the hub, whose rows are looked at when they are read.
        uncaptioned: the first rows without caption.
        captions_cut: captions that are longer than the text encoders read; estimated from a sample in large data sets.
        small_buckets: pairs of each size "HxW" of which there are too few for a batch: they are never used.
        unit: what the examples are called.
        kinds: of labelled pictures and lists, how many there are of each kind.
        warnings: what the data would teach beside what is good.
    """

    name: str
    counts: dict[str, int]
    used: int | None
    uncaptioned: list[str] = field(default_factory=list)
    captions_cut: int = 0
    small_buckets: dict[str, int] = field(default_factory=dict)
    unit: str = "pairs"
    kinds: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What is said of it."""
        counts = dict(self.counts)
        rows = counts.pop("rows")
        left = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none"
        used = "read from the hub, counted as they come" if self.used is None else f"{self.used:,} {self.unit} used"
        found = [f"data: {self.name}: {rows:,} rows, {used}" + ("" if self.used is None else f"; left out: {left}")]
        found += [f"data: {line}" for line in Summary(self.kinds, self.warnings).lines()]
        if self.uncaptioned:
            found.append(f"data: without caption: {'; '.join(self.uncaptioned)}" + _more(counts, self.uncaptioned))
        if self.captions_cut:
            found.append(f"data: {self.captions_cut:,} captions are longer than the text encoder reads, and are cut")
        if self.small_buckets:
            sizes = ", ".join(f"{count} of {size}" for size, count in self.small_buckets.items())
            found.append(
                f"data: {sum(self.small_buckets.values()):,} {self.unit} are never used: their aspect-ratio buckets "
                f"hold less than a batch of all processes ({sizes})"
            )
        return found

    def say(self) -> None:
        """Once, to the reader of the run."""
        print("\n".join(self.lines()), file=sys.stderr, flush=True)

    def write(self, folder: Path) -> None:
        """As ``data.json``, for reports."""
        (folder / COUNTS).write_text(json.dumps(asdict(self), indent=1) + "\n")


def add_data(folder: Path, report: Report) -> None:
    """What the examples of the run in ``folder`` are, and what of them it left out."""
    report.text("## Data")
    found = kept_counts(folder)
    if found is None:
        report.text(f"There is no `{COUNTS}`: the run's data were not counted.")
        return
    report.facts(data_facts(folder, found))
    if found.warnings:
        report.text("Warnings:\n\n" + "\n".join(f"- {text}" for text in found.warnings))
    if found.uncaptioned:
        report.text("Without caption:\n\n" + "\n".join(f"- {row}" for row in found.uncaptioned))


def kept_counts(folder: Path) -> LeftOut | None:
    """What the run in ``folder`` counted of its data; None where it did not."""
    if not (folder / COUNTS).is_file():
        return None
    return LeftOut(**json.loads((folder / COUNTS).read_text()))


def data_facts(folder: Path, found: LeftOut) -> dict[str, str]:
    """Counts for reading, with what turned out unreadable in the run."""
    unreadable = sum(len(file.read_text().splitlines()) for file in folder.glob("corrupt_pairs*.jsonl"))
    return {
        "data set": found.name,
        **{name: f"{count:,}" for name, count in (found.counts | found.kinds).items()},
        "used": "counted as they come" if found.used is None else f"{found.used:,}",
        "unreadable, found in this run": f"{unreadable:,}",
        "captions longer than the text encoder reads": f"{found.captions_cut:,}",
        "in buckets too small for a batch": f"{sum(found.small_buckets.values()):,}",
    }


def left_out(pairs: Pairs, source: PairLoader | StreamLoader, adapter: Adapter) -> LeftOut:
    """Count what ``source`` makes of ``pairs``."""
    small = source.never_used() if isinstance(source, PairLoader) else {}
    found = pairs.summary()
    return LeftOut(
        pairs.name,
        pairs.counts,
        pairs.used,
        pairs.uncaptioned,
        _captions_cut(pairs.caption_sample, pairs.used or 0, adapter),
        {f"{height}x{width}": count for (height, width), count in small.items()},
        pairs.unit,
        found.counts,
        found.warnings,
    )


def _captions_cut(sample: Sequence[str], used: int, adapter: Adapter) -> int:
    """Captions of all that some text encoder cuts, by a sample of them."""
    return round(len(cut_prompts(adapter, sample)) * max(1.0, used / max(len(sample), 1)))


def _more(counts: dict[str, int], named: list[str]) -> str:
    count = counts.get("without caption", 0) - len(named)
    return f" and {count:,} more" if count > 0 else ""
