"""Pictures that may be seen, by opaque ids; nothing outside the roots is among them."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from diffusion_align.pictures import CorruptImageError
from diffusion_align.studio.sources.parquet_cells import ParquetCells
from diffusion_align.studio.sources.served_pictures import Served, as_png, clean
from diffusion_align.studio.sources.units import Picture

from .thumbnails import Thumbnails

#: Ids that are remembered; the oldest are forgotten first.
MOST_IDS = 50_000
#: Sets of pictures that are kept ready.
MOST_READY = 12


@dataclass(frozen=True)
class Entry:
    """One picture of those that are shown together.

    Attributes:
        pictures: all of them, as they decide on the format together.
        small: a thumbnail.
        blind: nothing may be told of where it comes from, not even if it cannot be read.
        lossless: as PNG, whatever it is stored as.
        visit: makes the id one of this visit alone.
    """

    pictures: tuple[Picture, ...]
    number: int
    small: bool = False
    blind: bool = False
    lossless: bool = False
    visit: str = ""


@dataclass
class Catalogue:
    """From ids to pictures.

    Attributes:
        roots: resolved folders and files that pictures must lie in.
        kept: where thumbnails are kept.
    """

    roots: tuple[Path, ...]
    kept: Path
    cells: ParquetCells = field(default_factory=ParquetCells)
    thumbnails: Thumbnails = field(init=False)
    _entries: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    _ids: dict[Entry, str] = field(default_factory=dict)
    _ready: OrderedDict[tuple[Picture, ...], list[Served]] = field(default_factory=OrderedDict)
    _inside: dict[Path, bool] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.thumbnails = Thumbnails(self.kept, self.cells)

    def holds(self, place: Path) -> bool:
        """Whether a file or folder lies within the roots, wherever links lead."""
        if place not in self._inside:
            real = place.resolve()
            self._inside[place] = any(real == root or root in real.parents for root in self.roots)
        return self._inside[place]

    def add(self, entry: Entry) -> str:
        """An id for a picture; the same for the same entry.

        Raises:
            LookupError: it lies outside the roots.
        """
        if not all(self.holds(picture.file) for picture in entry.pictures):
            raise LookupError("a picture lies outside the folders that the studio was started with")
        with self._lock:
            if entry not in self._ids:
                name = secrets.token_urlsafe(12)
                self._ids[entry], self._entries[name] = name, entry
                if len(self._entries) > MOST_IDS:
                    _, oldest = self._entries.popitem(last=False)
                    del self._ids[oldest]
            return self._ids[entry]

    def shown(self, pictures: Sequence[Picture], visit: str) -> list[str]:
        """Ids of pictures that are judged: nothing is told of them."""
        return [self.add(Entry(tuple(pictures), number, blind=True, visit=visit)) for number in range(len(pictures))]

    def picture(self, name: str) -> Picture:
        """The picture of an id.

        Raises:
            LookupError: no such id.
        """
        entry = self._entry(name)
        return entry.pictures[entry.number]

    def read(self, name: str) -> Served:
        """What an id stands for.

        Raises:
            LookupError: no such id.
            CorruptImageError: it cannot be read; file, row and column are named unless it is blind.
        """
        entry = self._entry(name)
        try:
            return self._read(entry)
        except (ValueError, OSError) as error:
            text = "this picture cannot be read" if entry.blind else str(error)
            raise CorruptImageError(text) from None

    def _entry(self, name: str) -> Entry:
        with self._lock:
            if name not in self._entries:
                raise LookupError("no such picture")
            return self._entries[name]

    def _read(self, entry: Entry) -> Served:
        picture = entry.pictures[entry.number]
        if entry.small:
            return self.thumbnails.read(picture)
        if entry.lossless:
            return as_png(picture.read(self.cells), picture.where)
        with self._lock:
            ready = self._ready.get(entry.pictures)
        if ready is None:
            contents = [picture.read(self.cells) for picture in entry.pictures]
            ready = clean(contents, [picture.where for picture in entry.pictures])
            with self._lock:
                self._ready[entry.pictures] = ready
                while len(self._ready) > MOST_READY:
                    self._ready.popitem(last=False)
        return ready[entry.number]
