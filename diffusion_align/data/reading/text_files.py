"""Tables in text files: text stays as it is written, and what cannot be read is named by file and row."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

#: Columns of CSV files that hold numbers. All others hold text: a caption may well be 007, null or 1e5.
NUMBERS = re.compile(r"label_.+|preference|weight|score_.+|scale_[01]|num_example_per_prompt|votes_[01]|rank(ing)?")
#: Columns of CSV files that hold yes or no.
SWITCHES = {"has_label": True, "are_different": True}
YES_NO = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
#: Marks at the start of files, and what they stand for. Those of 32 bits start like those of 16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with their mark; line ends stay as they are.

    Raises:
        OSError: it cannot be read.
        ValueError: another encoding, or a NUL character, which no text holds; file and line are named.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not {encoding.upper()} text ({error.reason}): save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line}: a NUL character: the file is damaged, or is UTF-16 without its mark")
    return text


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and content of each line that is not blank. Only line feeds and carriage returns end lines:
    U+2028, U+0085 and form feeds are characters of the text.

    Raises:
        OSError, ValueError: as :func:`read_text`.
    """
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), start=1):
        if line.strip():
            yield number, line.removesuffix("\n")


def read_jsonl(path: Path) -> list[tuple[int, Any]]:
    """Line number and value of every line of a JSON Lines file.

    Raises:
        OSError, ValueError: as :func:`read_text`; also a line that is not JSON.
    """
    values = []
    for number, line in text_lines(path):
        try:
            values.append((number, json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
    return values


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Names and rows of a CSV file, everything as text.

    Raises:
        OSError, ValueError: as :func:`read_text`; also no header, a name twice, or a row with more or fewer fields.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        names = next(reader, [])
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{path}: expected a first line with a name for each column, each once, found {names}")
        rows: list[list[str]] = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise ValueError(
                    f"{path}, row {len(rows)} (line {reader.line_num}): {len(row)} fields, expected {len(names)} "
                    f"({', '.join(names)}); text with commas must be in quotes"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None
    return names, rows


def csv_table(path: Path) -> pa.Table:
    """A CSV file with numbers in the columns that hold numbers by their name, and text as written in all others.

    Raises:
        OSError, ValueError: as :func:`read_csv`; also no number where there should be one.
    """
    names, rows = read_csv(path)
    columns: dict[str, pa.Array] = {}
    for place, name in enumerate(names):
        values = [row[place] for row in rows]
        if name in SWITCHES:
            columns[name] = pa.array(_parsed(values, name, path, _switch, "true or false"), pa.bool_())
        elif NUMBERS.fullmatch(name):
            columns[name] = pa.array(_parsed(values, name, path, float, "a number"), pa.float64())
        else:
            columns[name] = pa.array(values, pa.string())
    return pa.table(columns)


def jsonl_table(path: Path) -> pa.Table:
    """A JSON Lines file of objects; a key that a line lacks is null there.

    Raises:
        OSError, ValueError: as :func:`read_jsonl`; also a line that is no object, or a column of several types.
    """
    rows: list[dict[str, Any]] = []
    for number, row in read_jsonl(path):
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number}: expected an object such as {{"caption": ...}}, found {row!r}')
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows], name, path) for name in names})


def _parsed(values: list[str], name: str, path: Path, parse: Callable[[str], Any], expected: str) -> list[Any]:
    found: list[Any] = []
    for row, value in enumerate(values):
        try:
            found.append(parse(value) if value.strip() else None)
        except (ValueError, KeyError):
            raise ValueError(f"{path}, row {row}: {name} = {value!r} is wrong: expected {expected}") from None
    return found


def _switch(value: str) -> bool:
    return YES_NO[value.strip().lower()]


def _column(values: list[Any], name: str, path: Path) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:  # a number of more than 64 bits, too
        kinds = [type(value) for value in values]
        usual = max({kind for kind in kinds if kind is not type(None)}, key=kinds.count)
        row = next((i for i, kind in enumerate(kinds) if kind not in (usual, type(None))), None)
        if row is None:
            raise ValueError(f"{path}: column {name!r} cannot be read ({error})") from None
        raise ValueError(
            f"{path}, row {row}: {name} = {values[row]!r} is wrong: expected {usual.__name__}, as in the other rows"
        ) from None
