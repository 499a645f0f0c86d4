"""``diffusion-align data import, export, check, dedup, stats, split``: what they print, and their exit status."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_align.commands.console import conclude, note
from diffusion_align.data.importers.pickapic_files import Import, import_pairs
from diffusion_align.data.tending.checked import check_pairs
from diffusion_align.data.tending.deduplicated import find_duplicates, write_without
from diffusion_align.data.tending.divided import divide
from diffusion_align.data.tending.exported import export_pairs
from diffusion_align.data.tending.pair_figures import pair_figures
from diffusion_align.data.tending.raw_pairs import splits_of
from diffusion_align.files import check_writable
from diffusion_align.studio.labels.label_tasks import TASK
from diffusion_align.studio.labels.pickapic_export import export_labels

from .pair_options import CheckOptions, DedupOptions, ImportOptions, PairExportOptions, SplitOptions, StatsOptions


def run_import(options: ImportOptions) -> int:
    """Import, and say what came of it; returns the exit status."""
    out = Path(options.out)
    check_writable(out)
    task = Import(options.source, options.format, options.split, options.rank_best, options.soft_labels,
                  options.limit, options.shard_size, options.max_missing)  # fmt: skip
    found = import_pairs(task, out, progress=note)
    _say({**found, "out": str(out)})
    return 0


def run_export(options: PairExportOptions) -> int:
    """Export, and say what was written and what could not be; returns the exit status."""
    out = _empty(options.out)
    if (Path(options.source) / TASK).is_file():
        return _export_labels(options, out)
    if options.merge is not None:
        raise ValueError(f"--merge {options.merge}: {options.source} is no folder of labels, its rows have one verdict")
    _say({**export_pairs(options.source, options.split, options.format, out), "out": str(out)})
    return 0


def _export_labels(options: PairExportOptions, out: Path) -> int:
    """Export a folder of the studio's labels.

    Raises:
        ValueError: another format, which other programs' readers of tables write.
    """
    if options.format != "pickapic":
        raise ValueError(
            f"--format {options.format}: {options.source} is a folder of labels: export it with --format pickapic, and "
            "that folder with this one"
        )
    told = export_labels(Path(options.source), out, options.merge or "majority")
    counts = {"pairs": sum(told.rows.values()), "ties": told.ties, "skipped": told.skipped, "lost": told.lost,
              "leaking": told.leaking}  # fmt: skip
    _say({**counts, "out": str(out)})
    return 0


def run_check(options: CheckOptions) -> int:
    """Check; returns 1 where something must be mended."""
    found = check_pairs(options.source, splits_of(options.source, options.splits), options.decode)
    lines = [_line({**{f"{split} pairs": count for split, count in found.splits.items()}, **dict(found.counts)})]
    texts = {"corrupt": "pictures that cannot be decoded", "leaked_prompts": "prompts in two splits",
             "leaked_pictures": "pictures in two splits", "contradicting": "pairs with verdicts for either picture",
             "repeated": "pairs that are there twice", "identical": "pairs of a picture with itself"}  # fmt: skip
    for kind, text in texts.items():
        if total := found.totals[kind]:
            lines += _cases(f"{total:,} {text}", getattr(found, kind), total)
    lines.append("must be mended: exit status 1" if found.failed else "nothing that must be mended")
    conclude("\n".join(lines), found.to_json())
    return int(found.failed)


def run_dedup(options: DedupOptions) -> int:
    """Tell the duplicates, and write the rest if that is asked for; returns the exit status."""
    out = None if options.out is None else _empty(options.out)
    found = find_duplicates(options.source, options.split, options.near)
    if out is not None:
        write_without(options.source, options.split, found, out)
    lines = [_line({**dict(found.counts), "kept": len(found.keep)})]
    for kind, cases in found.named.items():
        lines += _cases(f"{found.counts[kind]:,} {kind}", cases, found.counts[kind])
    lines += [] if options.out is None else [options.out]
    conclude("\n".join(lines), {**found.to_json(), "out": options.out})
    return 0


def run_stats(options: StatsOptions) -> int:
    """Print the figures; returns the exit status."""
    _say(pair_figures(options.source, options.split, options.sizes))
    return 0


def run_split(options: SplitOptions) -> int:
    """Part the data set, and say what each part has; returns the exit status."""
    out = _empty(options.out)
    shares = {name: share for name, share in (("test", options.test), ("validation", options.validation)) if share}
    _say({**divide(options.source, options.split, shares, options.seed, out), "out": str(out)})
    return 0


def _empty(name: str) -> Path:
    """A folder that can be written and has nothing in it.

    Raises:
        FileExistsError: something is in it.
        OSError: it cannot be written.
    """
    folder = Path(name)
    check_writable(folder)
    if any(folder.iterdir()):
        raise FileExistsError(f"--out {folder} is not empty: give a new folder")
    return folder


def _say(found: Mapping[str, Any]) -> None:
    """A line for each thing."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            lines.append(f"{name}:")
            for inner, told in value.items():
                lines.append(f"  {inner}: {_line(told) if isinstance(told, dict) else _number(told)}")
        else:
            lines.append(f"{name}: {_line(value) if isinstance(value, dict) else _number(value)}")
    conclude("\n".join(lines), found)


def _cases(title: str, cases: list[str], total: int) -> list[str]:
    """The first cases of one kind, and how many more there are."""
    more = [f"  and {total - len(cases):,} more"] if total > len(cases) else []
    return [f"{title}:", *(f"  {case}" for case in cases), *more]


def _line(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_number(value)} {name}" for name, value in values.items())


def _number(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
