"""Pairs written for other programs, with counts of what these cannot hold."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from diffusion_align.files import write_whole
from diffusion_align.pictures import decoded_picture, picture_header

from ..reading.rows import SOFT_LABEL, weight_of
from .raw_pairs import RawPair, raw_pairs
from .rewritten import pickapic_row, readable, write_rows

#: What a file of each of Pillow's formats is called; others become PNG.
ENDINGS: Mapping[str, str] = MappingProxyType({"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"})


def export_pairs(source: str | Path, split: str, format: str, out: Path) -> dict[str, int]:
    """Write a split of ``source`` in ``format``, a key of ``WRITERS``.

    Returns:
        "pairs" that were written, and what could not be: "ties", "soft labels", "weights", "without label", "corrupt".

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_pairs``; no pair is left.
    """
    counts: Counter[str] = Counter()
    lost: list[str] = []
    WRITERS[format](readable(raw_pairs(source, split), lost), out, split, counts)
    counts["corrupt"] = len(lost)
    if not counts["pairs"]:
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"{source}: no pair that {format} can hold ({told})")
    return dict(counts)


def _decided(pairs: Iterator[RawPair], counts: Counter[str]) -> Iterator[tuple[RawPair, bytes, bytes, float]]:
    """Pairs with a better picture: it, the other one, and P(it is preferred)."""
    for pair in pairs:
        label, (first, second) = pair.label_0, pair.pictures
        assert isinstance(first, bytes)
        assert isinstance(second, bytes)
        if label is None or label == 0.5:
            counts["without label" if label is None else "ties"] += 1
            continue
        soft = pair.row.get(SOFT_LABEL)
        sure = label if soft is None else float(soft)
        yield (pair, first, second, sure) if label > 0.5 else (pair, second, first, 1 - sure)


def _to_pickapic(pairs: Iterator[RawPair], out: Path, split: str, counts: Counter[str]) -> None:
    counts["pairs"] = write_rows((pickapic_row(pair) for pair in pairs), out, split)


def _to_folders(better: str, worse: str) -> Callable[[Iterator[RawPair], Path, str, Counter[str]], None]:
    def write(pairs: Iterator[RawPair], out: Path, split: str, counts: Counter[str]) -> None:
        for pair, chosen, rejected, sure in _decided(pairs, counts):
            counts["soft labels"] += sure != 1
            counts["weights"] += weight_of(pair.row, pair.where) != 1
            name = f"{counts['pairs']:06d}"
            for side, content in ((better, chosen), (worse, rejected)):
                ending, encoded = named(content)
                write_whole(out / side / f"{name}{ending}", encoded)
                write_whole(out / side / f"{name}.txt", pair.caption.encode() + b"\n")
            counts["pairs"] += 1

    return write


def _to_metadata(pairs: Iterator[RawPair], out: Path, split: str, counts: Counter[str]) -> None:
    """``metadata.jsonl`` as this package reads it: ties and soft labels fit in."""
    lines: list[str] = []
    for pair in pairs:
        label, number = pair.label_0, len(lines)
        if label is None:
            counts["without label"] += 1
            continue
        files = []
        for side, content in enumerate(pair.pictures):
            assert isinstance(content, bytes)
            ending, encoded = named(content)
            files.append(f"images/{number:06d}-{side}{ending}")
            write_whole(out / files[-1], encoded)
        soft = pair.row.get(SOFT_LABEL)
        sure = label if soft is None else float(soft)
        chosen, rejected, sure = (files[0], files[1], sure) if label >= 0.5 else (files[1], files[0], 1 - sure)
        row = {"chosen": chosen, "rejected": rejected, "caption": pair.caption, "preference": sure}
        weight = weight_of(pair.row, pair.where)
        lines.append(json.dumps(row if weight == 1 else row | {"weight": weight}))
    counts["pairs"] = len(lines)
    write_whole(out / "metadata.jsonl", "".join(line + "\n" for line in lines).encode())


def named(content: bytes) -> tuple[str, bytes]:
    """How a picture's file should end, and its bytes: as they are, or, of rare formats, as PNG."""
    ending = ENDINGS.get(picture_header(content, "a picture").format)
    if ending is not None:
        return ending, content
    buffer = io.BytesIO()
    decoded_picture(content, "a picture").save(buffer, "PNG")
    return ".png", buffer.getvalue()


#: Writers by the name of the format: (pairs, folder, split, counts).
WRITERS: Mapping[str, Callable[[Iterator[RawPair], Path, str, Counter[str]], None]] = MappingProxyType({
    "pickapic": _to_pickapic, "metadata": _to_metadata,
    "w-l": _to_folders("w", "l"), "chosen-rejected": _to_folders("chosen", "rejected"),
})  # fmt: skip
