"""The label files: one event a line, written and synced before anybody is told that it counts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_align.files import CHECKSUM, is_whole, journal_line, naming

from .verdicts import Verdict, live

#: File in a folder of labels that the studio holds while it runs; its content is the process's number.
LOCK = ".studio.lock"
#: What an annotator may be called.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class FolderInUseError(OSError):
    """Another studio has the folder."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Inside, the folder belongs to this process. The system frees it when the process ends, however it does.

    Raises:
        FolderInUseError: another process has it; its number is named.
        OSError: the folder cannot be written.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            raise FolderInUseError(f"{folder} is in use by another studio (pid {owner}): end that one first") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def checked_name(name: str) -> str:
    """``name``, if a file can be called so.

    Raises:
        ValueError: it cannot.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"annotator {name!r}: expected letters, digits, '.', '_' and '-', at most 64, no dot first")
    return name


def read_events(path: Path) -> tuple[dict[str, Any], list[Verdict | str], int]:
    """Header, events and how many bytes of a label file are whole lines; {}, [] and 0 if it is not there.

    Only a last line without an end is torn: it was never acknowledged. Nothing else is passed over.

    Raises:
        ValueError: a line is damaged, or of another kind; file and line are named.
    """
    events: list[Verdict | str] = []
    header: dict[str, Any] = {}
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is damaged: {error}; mend or delete the line") from None
        if not isinstance(row, dict) or not is_whole(row):
            raise ValueError(f"{where} does not match its checksum: it was damaged, or changed by hand")
        row.pop(CHECKSUM, None)
        kind = row.get("event")
        if number == 1:
            if kind != "header":
                raise ValueError(f"{where}: expected the header of a label file, found {kind!r}")
            header = row
        elif kind == "verdict":
            events.append(Verdict.from_row(row, where))
        elif kind == "undo":
            events.append(str(row["id"]))
        else:
            raise ValueError(f"{where}: expected a verdict or an undo, found {kind!r}")
    return header, events, whole


@dataclass
class LabelFile:
    """``LABELS/ANNOTATOR.jsonl``, open for one more line. What it says is kept in memory.

    Attributes:
        header: its first line.
        events: all verdicts and, as a visit's id, all that were taken back, in order.
    """

    path: Path
    header: Mapping[str, Any]
    events: list[Verdict | str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, annotator: str, settings: Mapping[str, Any]) -> LabelFile:
        """The file of ``annotator``; a torn last line is cut off, and a file that is new gets its header.

        Raises:
            ValueError: a line is damaged, a name no file can have, or the file belongs to other ``settings``.
            OSError: it cannot be written; the file is named.
        """
        path = folder / f"{checked_name(annotator)}.jsonl"
        header, events, whole = read_events(path)
        given = {"event": "header", "annotator": annotator, **json.loads(json.dumps(settings))}
        if path.is_file() and path.stat().st_size > whole:
            with naming(path):
                os.truncate(path, whole)
        file = cls(path, header or given, events)
        if not header:
            file._append(given)
        elif header != given:
            names = sorted(name for name in {**header, **given} if header.get(name) != given.get(name))
            raise ValueError(f"{path} was begun with other {', '.join(names)}: give another folder of labels")
        return file

    @property
    def verdicts(self) -> list[Verdict]:
        """Those that count, in order."""
        return live(self.events)

    def ids(self) -> set[str]:
        """Of all visits that were ever answered, also those that were taken back."""
        return {event.id for event in self.events if isinstance(event, Verdict)}

    def add(self, verdict: Verdict) -> bool:
        """Keep a verdict; False if that visit was answered before, and nothing was written.

        Raises:
            OSError: it cannot be written, and does not count; the file is as it was.
        """
        if verdict.id in self.ids():
            return False
        self._append(verdict.to_row())
        self.events.append(verdict)
        return True

    def undo(self) -> Verdict | None:
        """Take back the last verdict that counts, and return it; None if there is none.

        Raises:
            OSError: it cannot be written, and nothing is taken back.
        """
        found = self.verdicts
        if not found:
            return None
        self._append({"event": "undo", "id": found[-1].id})
        self.events.append(found[-1].id)
        return found[-1]

    def _append(self, row: Mapping[str, Any]) -> None:
        """One write and one fsync; a line that does not fit is cut off again."""
        line, new = journal_line(row).encode(), not self.path.exists()
        with naming(self.path):
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                size = os.fstat(handle).st_size
                try:
                    if os.write(handle, line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(handle)
                except OSError:
                    os.ftruncate(handle, size)
                    raise
            finally:
                os.close(handle)
            if new:
                _sync_folder(self.path.parent)


def _sync_folder(folder: Path) -> None:
    """A new file's name is on the disk, too."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_labels(folder: Path) -> dict[str, list[Verdict]]:
    """Verdicts that count of every annotator in a folder, by name, sorted; a torn last line is passed over.

    Raises:
        FileNotFoundError: no label file is there.
        ValueError: as ``read_events``.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{folder}: no label file (ANNOTATOR.jsonl) is there")
    found: dict[str, list[Verdict]] = {}
    for file in files:
        header, events, _ = read_events(file)
        if header:
            found[str(header["annotator"])] = live(events)
    return found


def counted(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many verdicts there are of each kind, and how many were hasty."""
    found = {"better": 0, "tie": 0, "bad": 0, "skip": 0, "hasty": 0}
    for verdict in verdicts:
        found[verdict.choice] += 1
        found["hasty"] += verdict.hasty
    return found
