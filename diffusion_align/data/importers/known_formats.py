"""Every format that can be imported, by name; which one a folder has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from . import paired_folders, published_rankings, published_votes
from .imported import ImportedPair, Wanted
from .places import Place

Reader = Callable[[Place, Wanted], Iterator[ImportedPair]]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        text: what it is, for help.
        read: its pairs.
        fits: whether a folder looks like it.
        columns: of Pick-a-Pic's and ours that are optional, those that it fills.
        folders: in which the names of pictures may start.
    """

    text: str
    read: Reader
    fits: Callable[[Path], bool]
    columns: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


def _columns(folder: Path) -> set[str]:
    """Of the first parquet file of a folder; none where there is none that can be read."""
    import pyarrow
    import pyarrow.parquet

    files = sorted(folder.glob("*.parquet")) + sorted(folder.glob("data/*.parquet"))
    try:
        return set(pyarrow.parquet.read_schema(files[0]).names) if files else set()
    except (OSError, pyarrow.ArrowException):
        return set()


def _keys(folder: Path, pattern: str) -> set[str]:
    """Keys of the first row of the JSON files that fit ``pattern``."""
    for path in sorted(folder.glob(pattern)):
        with path.open(encoding="utf-8", errors="replace") as file:
            start = file.read(2**20).lstrip().lstrip("[").lstrip()
        try:
            row, _ = json.JSONDecoder().raw_decode(start)
        except ValueError:
            continue
        if isinstance(row, dict):
            return set(row)
    return set()


def _has_folders(folder: Path, names: tuple[str, str]) -> bool:
    return all((folder / name).is_dir() for name in names)


FORMATS: Mapping[str, Format] = MappingProxyType({
    "pickapic": Format(
        "Pick-a-Pic v1 and v2, and whatever has its columns",
        lambda place, wanted: published_votes.read_pickapic(place.root, wanted),
        lambda folder: {"jpg_0", "label_0"} <= _columns(folder),
        ("models", "votes", "user_id", "ranking_id"),
    ),
    "rapidata": Format(
        "Rapidata: image1, image2, votes_image1, votes_image2",
        published_votes.read_rapidata,
        lambda folder: {"image1", "votes_image1"} <= _columns(folder),
        ("models", "votes"),
    ),
    "image-preferences": Format(
        "open-image-preferences: Argilla's responses, and folders image_*_dev, image_*_sd",
        published_votes.read_image_preferences,
        lambda folder: "preference.responses" in _columns(folder),
        ("models", "user_id", "both_bad"),
    ),
    "imagerewarddb": Format(
        "ImageRewardDB: a row and a rank for each picture, zip archives",
        published_rankings.read_imagerewarddb,
        lambda folder: any(folder.glob("metadata-*.parquet")) or {"image_path", "prompt_id", "rank"} <= (
            _keys(folder, "images/*/*.json") | _keys(folder, "images/*/*/*.json")),
        ("ranking_id",),
    ),
    "hpdv2": Format(
        "HPDv2: train.json (human_preference) and test.json (ranks)",
        published_rankings.read_hpdv2,
        lambda folder: bool({"human_preference", "raw_annotations"} & _keys(folder, "t*.json")),
        ("user_id", "ranking_id"),
        ("train", "test", "images"),
    ),
    "hpdv3": Format(
        "HPDv3 and HPDv3++: path1 is preferred to path2, split tar archives",
        published_rankings.read_hpdv3,
        lambda folder: {"path1", "path2"} <= _keys(folder, "*.json"),
        ("models", "confidence", *(f"label_0_{axis}" for axis in published_rankings.AXES.values())),
        ("images",),
    ),
    "invoke": Format(
        "invoke-training: metadata.jsonl with image_0, image_1, prefer_0, prefer_1",
        paired_folders.read_invoke,
        lambda folder: "prefer_0" in _keys(folder, "metadata.jsonl"),
    ),
    "w-l": Format(
        "folders w/ and l/ with equal names and NAME.txt (sd-scripts)",
        paired_folders.read_w_l,
        lambda folder: _has_folders(folder, paired_folders.FOLDERS["w-l"]),
    ),
    "chosen-rejected": Format(
        "folders chosen/ and rejected/ with equal names and NAME.txt (OneTrainer)",
        paired_folders.read_chosen_rejected,
        lambda folder: _has_folders(folder, paired_folders.FOLDERS["chosen-rejected"]),
    ),
    "suffixes": Format(
        "NAME_w.png and NAME_l.png in one folder, with NAME.txt",
        paired_folders.read_suffixes,
        lambda folder: any(folder.glob("*_w.*")) and any(folder.glob("*_l.*")),
    ),
})  # fmt: skip


def find_format(folder: Path) -> str:
    """The name of the format that a folder has.

    Raises:
        ValueError: none that is known; all are named.
    """
    for name, known in FORMATS.items():
        if known.fits(folder):
            return name
    told = "\n".join(f"  {name:<18}{known.text}" for name, known in FORMATS.items())
    raise ValueError(f"{folder} has no format that is known. Say which with --format:\n{told}")
