"""A folder with pictures and archives of pictures, of which nothing outside is ever read or written."""

from __future__ import annotations

import io
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from .imported import Picture

#: "images.tar", "images.tar.gz", and parts of one: "images.tar.gz.000", "images.tar.partaa".
TAR = re.compile(r"(?P<stem>.+\.tar(?:\.gz|\.bz2|\.xz)?)(?:\.(?:part)?[-_]?[0-9a-z]{1,4})?", re.IGNORECASE)
#: Bytes of one picture; more is an archive that would fill the disk.
LARGEST = 256 * 2**20


class UnsafeArchiveError(ValueError):
    """An archive with a member that would be written elsewhere, or that is no plain file; both are named."""


def safe_name(name: str, where: str) -> PurePosixPath:
    """A relative path below the folder that it is meant for.

    Raises:
        UnsafeArchiveError: it is absolute, climbs out, or has a drive or a NUL in it.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise UnsafeArchiveError(f"{where}: the path {name!r} leads out of its folder: expected one inside of it")
    return path


class Joined(io.RawIOBase):
    """The bytes of several files, one after the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._rest = list(files)
        self._file: io.BufferedReader | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._file is None:
                if not self._rest:
                    return 0
                self._file = self._rest.pop(0).open("rb")
            count = self._file.readinto(buffer)
            if count:
                return count
            self._file.close()
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class Place:
    """A folder that a set lies in.

    Args:
        root: the folder.
        scratch: where tar archives are unpacked, if pictures are in some; removed by ``close``.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: expected the folder of a preference set on this disk")
        self.root, self.scratch = root, scratch
        self._unpacked = False

    def read(self, picture: Picture, where: str, also: Sequence[str] = ()) -> bytes:
        """An encoded picture.

        Args:
            also: folders, below the root, in which names may start.

        Raises:
            FileNotFoundError: it is neither in the folder nor in an archive.
            UnsafeArchiveError: its name leads out of the folder, or an archive is not safe.
        """
        if isinstance(picture, bytes):
            return picture
        name = safe_name(picture, where)
        names = [name, *(PurePosixPath(start) / name for start in also)]
        found = self._file(self.root, names, where)
        if found is None:
            content = self._zipped(names)
            if content is not None:
                return content
            self._unpack()
            found = self._file(self.scratch, names, where)
        if found is None:
            raise FileNotFoundError(f"{where}: picture {picture} is neither in {self.root} nor in an archive there")
        return found.read_bytes()

    def close(self) -> None:
        """Remove what was unpacked."""
        for archive, _ in self._zips.values() if "_zips" in vars(self) else ():
            archive.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _file(self, root: Path, names: Sequence[PurePosixPath], where: str) -> Path | None:
        for name in names:
            path = root / name
            if path.is_file():
                if not path.resolve().is_relative_to(root.resolve()):
                    raise UnsafeArchiveError(
                        f"{where}: {path} is a link out of {root}: expected a picture inside of it"
                    )
                return path
        return None

    @cached_property
    def _zips(self) -> dict[PurePosixPath, tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
        """Members of all zip archives, by the names that rows may give them: with and without the archive's own."""
        found: dict[PurePosixPath, tuple[zipfile.ZipFile, zipfile.ZipInfo]] = {}
        for path in sorted(self.root.rglob("*.zip")):
            archive = zipfile.ZipFile(path)
            beside = PurePosixPath(path.parent.relative_to(self.root).as_posix())
            for member in archive.infolist():
                if member.is_dir():
                    continue
                name = safe_name(member.filename, f"{path}")
                if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                    raise UnsafeArchiveError(f"{path}: {member.filename} is a link or device: expected plain files")
                for known in (name, beside / name, beside / path.stem / name):
                    found.setdefault(known, (archive, member))
        return found

    def _zipped(self, names: Sequence[PurePosixPath]) -> bytes | None:
        for name in names:
            if name in self._zips:
                archive, member = self._zips[name]
                if member.file_size > LARGEST:
                    raise UnsafeArchiveError(f"{archive.filename}: {member.filename} has {member.file_size:,} bytes")
                return archive.read(member)
        return None

    def _unpack(self) -> None:
        if self._unpacked:
            return
        self._unpacked = True
        for files in tar_archives(self.root):
            unpack_tar(files, self.scratch)


def tar_archives(root: Path) -> Iterator[list[Path]]:
    """The tar archives of a folder, each as its parts in order."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        found = TAR.fullmatch(path.name)
        if found is not None:
            groups.setdefault(str(path.parent / found["stem"]), []).append(path)
    yield from groups.values()


def unpack_tar(files: Sequence[Path], folder: Path) -> None:
    """Unpack a tar archive, in one or several parts, member by member.

    Raises:
        UnsafeArchiveError: a member that is a link or a device, that would land elsewhere, or that is too large.
        ValueError: it is no tar archive, or torn.
    """
    named = str(files[0]) + (f" and {len(files) - 1} parts" if len(files) > 1 else "")
    try:
        with io.BufferedReader(Joined(files), 2**20) as joined, tarfile.open(fileobj=joined, mode="r|*") as archive:
            for member in archive:
                if member.isdir():
                    continue
                name = safe_name(member.name, named)
                if not member.isfile():
                    raise UnsafeArchiveError(f"{named}: {member.name} is a link or device: expected plain files")
                if member.size > LARGEST:
                    raise UnsafeArchiveError(f"{named}: {member.name} has {member.size:,} bytes")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                with target.open("wb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{named} cannot be unpacked: {error}") from error
