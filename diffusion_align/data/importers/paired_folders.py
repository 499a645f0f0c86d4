"""Readers of other programs' folders: pictures that belong together by their names, and invoke-training's list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from diffusion_align.pictures import SUFFIXES

from ..reading.text_files import read_jsonl, text_lines
from .imported import ImportedPair, Wanted, text_of, truth_of
from .places import Place

#: Sub-folders whose pictures of equal names are a pair, the better one first.
FOLDERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"w-l": ("w", "l"), "chosen-rejected": ("chosen", "rejected")}
)
#: Ends of names in one folder, the better one first.
ENDS = ("_w", "_l")
#: Names told where some have no partner.
MOST_TOLD = 20


def read_w_l(place: Place, wanted: Wanted) -> Iterator[ImportedPair]:
    """``w/NAME.png`` is preferred to ``l/NAME.png``, NAME.txt in either holds the caption (sd-scripts)."""
    yield from _two_folders(place, *FOLDERS["w-l"])


def read_chosen_rejected(place: Place, wanted: Wanted) -> Iterator[ImportedPair]:
    """The same with ``chosen/`` and ``rejected/`` (OneTrainer)."""
    yield from _two_folders(place, *FOLDERS["chosen-rejected"])


def read_suffixes(place: Place, wanted: Wanted) -> Iterator[ImportedPair]:
    """``NAME_w.png`` is preferred to ``NAME_l.png`` beside it; NAME.txt, NAME_w.txt or NAME_l.txt holds the caption."""
    sides = [{stem.removesuffix(end): path for stem, path in _pictures(place.root).items() if stem.endswith(end)}
             for end in ENDS]  # fmt: skip
    others = [path for stem, path in _pictures(place.root).items() if not stem.endswith(ENDS)]
    yield from _matched(place, sides[0], sides[1], others)


def read_invoke(place: Place, wanted: Wanted) -> Iterator[ImportedPair]:
    """invoke-training: metadata.jsonl with ``prompt``, ``image_0``, ``image_1``, ``prefer_0``, ``prefer_1``; neither
    preferred: not judged, both: a tie."""
    path = place.root / "metadata.jsonl"
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
        chosen = [truth_of(row.get(name), where, name) for name in ("prefer_0", "prefer_1")]
        label = {(True, False): 1.0, (False, True): 0.0, (True, True): 0.5}.get((chosen[0], chosen[1]))
        names = [text_of(row.get(name), where, name) for name in ("image_0", "image_1")]
        yield ImportedPair((names[0], names[1]), text_of(row.get("prompt"), where, "prompt"), label, where)


def _two_folders(place: Place, better: str, worse: str) -> Iterator[ImportedPair]:
    yield from _matched(place, _pictures(place.root / better), _pictures(place.root / worse), [])


def _pictures(folder: Path) -> dict[str, Path]:
    """Pictures of a folder and of those in it, by their names without ending.

    Raises:
        ValueError: two of one name.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{found[name]} and {path} have one name: expected one picture of each")
        found[name] = path
    return found


def _matched(
    place: Place, better: Mapping[str, Path], worse: Mapping[str, Path], others: list[Path]
) -> Iterator[ImportedPair]:
    """Pairs of equal names.

    Raises:
        ValueError: a picture without partner or caption, or none at all; all are named.
    """
    alone = [better[name] for name in better.keys() - worse.keys()] + [worse[n] for n in worse.keys() - better.keys()]
    if alone or others:
        names = sorted(path.relative_to(place.root).as_posix() for path in [*alone, *others])
        more = f" and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else ""
        raise ValueError(
            f"{place.root}: pictures without a partner of the same name: {', '.join(names[:MOST_TOLD])}{more}"
        )
    if not better:
        raise ValueError(f"{place.root}: no pictures, expected {', '.join(SUFFIXES)}")
    for name in sorted(better):
        pair = (better[name], worse[name])
        pictures = [path.relative_to(place.root).as_posix() for path in pair]
        yield ImportedPair((pictures[0], pictures[1]), _caption(place.root, name, pair), 1.0, pictures[0])


def _caption(root: Path, name: str, pair: tuple[Path, Path]) -> str:
    texts = [pair[0].with_suffix(".txt"), pair[1].with_suffix(".txt"), root / f"{name}.txt"]
    for text in texts:
        if text.is_file():
            caption = " ".join(line.strip() for _, line in text_lines(text))
            if not caption:
                raise ValueError(f"{text} is empty: expected the caption of {pair[0].name}")
            return caption
    raise ValueError(f"{pair[0]} has no caption: expected it in one of {', '.join(map(str, texts))}")
