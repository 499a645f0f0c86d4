"""Files that are whole or not there, whose errors name them, and that show when a byte of them has changed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.quiet import no_table_bars

if TYPE_CHECKING:
    from torch import Tensor

#: In a folder of weights: size and hash of each file beside it.
CHECKSUMS = "checksums.json"
#: In a JSON object: hash of all its other fields.
CHECKSUM = "checksum"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, ``path`` is written: what goes wrong becomes an OSError of the same kind that names it.

    A disk that is full says so when a buffer is written out, where Python no longer knows the file's name. What is
    written in Rust (safetensors, tokenizers) has other kinds of errors, whose text ends in "(os error 28)".
    """
    try:
        yield
    except OSError as error:
        if "cannot be written: " in str(error):  # a file in it was named already
            raise
        raise type(error)(f"{path} cannot be written: {error.strerror or error}") from error
    except Exception as error:
        if "(os error " not in str(error):
            raise
        raise OSError(f"{path} cannot be written: {error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write beside ``path`` and rename, so that no reader meets half a file.

    Raises:
        OSError: it cannot be written; the file is named, and what was there before stays.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's files are their owner's alone
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file that all may read, whole or not at all; returns it.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, partial, metadata=None if header is None else dict(header))
            partial.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return path


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is torn, or something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from None


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(value: Mapping[str, Any]) -> str:
    """Hash of a JSON object but for its field ``checksum``."""
    rest = {name: content for name, content in value.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_whole(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object is as ``with_checksum`` made it; without a checksum, as of 0.1, it is taken as it is."""
    if CHECKSUM in value:
        return bool(value[CHECKSUM] == checksum(value))
    *rest, last = value.items() or [("", None)]
    return last[1] != checksum(dict(rest))  # else it is the name that was damaged


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object that says itself whether it was changed."""
    return {**value, CHECKSUM: checksum(value)}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; if it has a checksum, it is one that agrees. Files of before 0.2 have none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is something else, or was changed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if not is_whole(value):
        raise ValueError(f"{path} does not match its checksum: it was damaged, or changed by hand")
    return value


def begin_folder(record: Path, task: Mapping[str, Any], begun: str = "begun") -> dict[str, Any]:
    """What ``record`` says of its folder; a new one is begun with {"task": task}.

    Args:
        begun: what the message says was done to a folder for something else.

    Raises:
        ValueError: the folder is for something else.
    """
    if not record.is_file():
        write_whole(record, json.dumps({"task": task}, indent=1).encode())
    kept = read_object(record)
    if (before := kept.get("task", {})) != task:
        differing = ", ".join(name for name in {**task, **before} if before.get(name) != task.get(name))
        raise ValueError(f"{record.parent} was {begun} with another {differing}: delete it, or give another folder")
    return kept


def journal_line(row: Mapping[str, Any]) -> str:
    """A line of a file that is appended to, with a checksum, for ``read_journal``."""
    return json.dumps(with_checksum(row)) + "\n"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of ``journal_line``, without their checksums; none if it is not there.

    The torn last line of a program that died is cut off. So is a damaged line, with all that follow it and a warning
    that names it: their work is done again. Lines of before 0.2 have no checksum.

    Raises:
        ValueError: its first line is damaged, which says what the rows are.
        OSError: it cannot be read or cut.
    """
    rows: list[dict[str, Any]] = []
    kept = 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and is_whole(row)
        except (ValueError, RecursionError):
            whole = False
        if not whole and not rows:
            raise ValueError(f"{path}, line 1 is damaged: delete the file, or give another --out")
        if not whole:
            warnings.warn(f"{path}, line {len(rows) + 1} is damaged: it and what follows is made again", stacklevel=2)
            break
        rows.append({name: value for name, value in row.items() if name != CHECKSUM})
        kept += len(line) + 1
    if path.is_file() and path.stat().st_size > kept:
        os.truncate(path, kept)
    return rows


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add lines for ``read_journal``; the file is made if it is not there.

    Raises:
        OSError: they cannot be written; the file is named.
    """
    with naming(path), path.open("a") as file:
        file.writelines(journal_line(row) for row in rows)


def write_parquet(path: Path, table: Any) -> None:
    """Write a ``datasets.Dataset``, whole or not at all, with a checksum of every page.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    partial = path.with_name(f".{path.name}.partial")
    with naming(path), no_table_bars():
        try:
            table.to_parquet(partial, write_page_checksum=True)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def files_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file in ``folder``, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }


def check_files(record: Path) -> None:
    """Whether the files beside ``record`` are as it says in "files", what ``files_in`` found; others may be there, too.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: it says something else or was changed, or the first file that is missing or differs; it is named.
    """
    folder, expected = record.parent, read_object(record).get("files")
    if not isinstance(expected, dict) or not all(
        isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys() for facts in expected.values()
    ):
        raise ValueError(f"{record}: expected the sizes and hashes of files in 'files'")
    for name, facts in expected.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != facts["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {facts['bytes']}")
        if sha256_of(path) != facts["sha256"]:
            raise ValueError(f"{path} does not match its checksum")


@contextmanager
def sealed_folder(folder: Path) -> Iterator[Path]:
    """Inside, the files of ``folder`` are written; afterwards they are noted for ``verify_folder``.

    Raises:
        OSError: they cannot be written; a file or the folder is named.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CHECKSUMS).unlink(missing_ok=True)
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes for the owner alone
        record = with_checksum({"files": files_in(folder)})
        write_whole(folder / CHECKSUMS, json.dumps(record, indent=1).encode() + b"\n")


def verify_folder(folder: Path) -> None:
    """Whether a folder's files are as they were written; a folder without ``checksums.json`` is taken as it is.

    Raises:
        ValueError: the file that is missing or differs is named.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    try:
        check_files(folder / CHECKSUMS)
    except ValueError as error:
        raise ValueError(f"{error}. If it was changed on purpose, delete {folder / CHECKSUMS}") from None


def check_free(files: Iterable[Path], overwrite: bool) -> None:
    """Whether ``files`` may be written: none is there, or ``overwrite`` says that it may be replaced.

    Raises:
        FileExistsError: one is there; it is named.
    """
    there = [] if overwrite else [path for path in files if path.exists()]
    if there:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise FileExistsError(f"{there[0]}{more} is already there: give another --out, or --overwrite")


def check_writable(folder: Path) -> None:
    """Make ``folder`` if it is not there, and try whether files can be made in it.

    Raises:
        OSError: they cannot; the folder is named.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
