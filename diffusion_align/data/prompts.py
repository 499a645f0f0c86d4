"""Prompt lists from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .pairs import load_pictures
from .reading.text_files import read_csv, read_jsonl, text_lines

#: Column names that hold the prompt in tables, in order of preference.
COLUMNS = ("prompt", "caption", "text")


def load_prompts(source: str | Path | Sequence[str]) -> list[str]:
    """Prompts of a .txt file (one a line), a .jsonl, .csv or .parquet table (prompt, caption or text), or a list.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a table without a prompt column, a line that is not JSON, or no prompt.
    """
    if not isinstance(source, str | Path):
        prompts = [str(prompt) for prompt in source]
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"prompt file {path} not found")
        if path.suffix not in _READERS:
            raise ValueError(f"{path}: expected a file of type {', '.join(_READERS)}")
        prompts = _READERS[path.suffix](path)
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(
            f"{source}: no prompt in it" if isinstance(source, str | Path) else "the list of prompts is empty"
        )
    return prompts


def _lines(path: Path) -> list[str]:
    return [line for _, line in text_lines(path)]


def _jsonl(path: Path) -> list[str]:
    rows: list[Mapping[str, object]] = []
    for line, row in read_jsonl(path):
        if not isinstance(row, str | dict):
            raise ValueError(f"{path}, line {line}: expected an object or text, found {type(row).__name__}")
        rows.append({"prompt": row} if isinstance(row, str) else row)
    return _column(rows, path)


def _csv(path: Path) -> list[str]:
    names, rows = read_csv(path)
    return _column([dict(zip(names, row, strict=True)) for row in rows], path)


def _parquet(path: Path) -> list[str]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    found = [name for name in COLUMNS if name in table.column_names]
    if not found:
        raise ValueError(f"{path}: expected a column {' or '.join(COLUMNS)}, found {', '.join(table.column_names)}")
    return [_text(value, path, f"row {row}") for row, value in enumerate(table.column(found[0]).to_pylist())]


def _text(value: object, path: Path, where: str) -> str:
    """A prompt as it stands there, "" for none.

    Raises:
        ValueError: a number, a list or the like.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{path}, {where}: prompt = {value!r} is wrong: expected text")
    return value or ""


def _column(rows: Sequence[Mapping[str, object]], path: Path) -> list[str]:
    if not rows:
        return []
    found = [name for name in COLUMNS if name in rows[0]]
    if not found:
        raise ValueError(f"{path}: expected a column {' or '.join(COLUMNS)}, found {', '.join(map(str, rows[0]))}")
    return [_text(row.get(found[0]), path, f"row {number}") for number, row in enumerate(rows)]


_READERS = {".txt": _lines, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def training_prompts(dataset: str, split: str) -> list[str]:
    """Prompts of a file, or the captions of a data set of pairs or pictures.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_prompts`` and ``load_pictures``.
    """
    if Path(dataset).suffix in (".txt", ".csv", ".jsonl") or Path(dataset).is_file():
        return load_prompts(dataset)
    pairs = load_pictures(dataset, split, streaming=True, keep_ties=True)  # pictures are neither read nor fetched
    return list(dict.fromkeys(pairs.captions()))
