"""Tables in text files: text as it is written, whatever it looks like, and one clear error for what is no table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion_align.data import Comparisons, PairDataset, load_pairs, load_prompts
from diffusion_align.data.reading.text_files import csv_table, jsonl_table
from tests.data.test_data import encoded, rows, streamed, written

HEADER = "chosen,rejected,caption"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "007", "null"):
        (tmp_path / name).write_bytes(encoded(len(name)))
    return tmp_path


def pairs(folder: Path, content: str | bytes, name: str = "metadata.csv") -> PairDataset:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    found = load_pairs(folder / name)
    assert isinstance(found, PairDataset)
    return found


TEXTS = ["null", "None", "NA", "nan", "007", "1984", "1e5", "true", "2024-01-01", "#x", "é"]
INNER_BREAKS = ["a\u2028b", "a\x85b", "a\x0cb"]


@pytest.mark.parametrize("text", TEXTS + INNER_BREAKS)
def test_captions_are_read_as_they_are_written(text: str, folder: Path) -> None:
    assert pairs(folder, f"{HEADER}\na.png,b.png,{text}\nb.png,a.png,{text}\n").captions() == [text, text]
    line = {"chosen": "a.png", "rejected": "b.png", "caption": text}
    assert pairs(folder, json.dumps(line, ensure_ascii=False) + "\n", "metadata.jsonl").captions() == [text]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_of_windows_tools_are_understood(encoding: str, end: str, folder: Path) -> None:
    content = end.join([HEADER, 'a.png,b.png,"a ""red"" star,', 'with two lines"', ""])
    assert pairs(folder, content.encode(encoding)).captions() == [f'a "red" star,{end}with two lines']


def test_names_that_look_like_numbers_are_names(folder: Path) -> None:
    record = pairs(folder, f"{HEADER}\n007,null,x\n")[0]
    assert record.chosen == encoded(3)
    assert record.rejected == encoded(4)


def test_columns_of_numbers_hold_numbers(folder: Path) -> None:
    table = csv_table(written_text(folder, "caption,weight,preference,has_label,user_id\n1,2,,false,3\n2,,.5,True,\n"))
    assert table.to_pylist() == [
        {"caption": "1", "weight": 2.0, "preference": None, "has_label": False, "user_id": "3"},
        {"caption": "2", "weight": None, "preference": 0.5, "has_label": True, "user_id": ""},
    ]


def written_text(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "caption\nx\n\x00y\n", r"t\.csv, line 3: a NUL character"),
        ("t.csv", "caption\nx\né\n".encode("latin-1"), r"t\.csv, line 3: not UTF-8 text .*save it as UTF-8"),
        ("t.csv", "caption,weight\nx,1\ny,heavy\n", r"t\.csv, row 1: weight = 'heavy' is wrong: expected a number"),
        ("t.csv", "caption,has_label\nx,maybe\n", r"row 0: has_label = 'maybe' is wrong: expected true or false"),
        (
            "t.csv",
            "caption,weight\nx,1\na, b,1\n",
            r"t\.csv, row 1 \(line 3\): 3 fields, expected 2 \(caption, weight\)",
        ),
        ("t.csv", "", r"t\.csv: expected a first line with a name for each column"),
        ("t.csv", 'caption\n"x\n', r"t\.csv, line 2: not valid CSV"),
        ("t.jsonl", '{"caption": "x"}\n{"caption": \n', r"t\.jsonl, line 2: not valid JSON"),
        ("t.jsonl", '{"caption": "x"}\n\n["x"]\n', r"t\.jsonl, line 3: expected an object"),
        (
            "t.jsonl",
            '{"caption": "x"}\n{"caption": 7}\n{"caption": "y"}\n',
            r"row 1: caption = 7 is wrong: expected str",
        ),
        ("t.jsonl", '{"caption": "\\ud800"}\n', r"t\.jsonl: column 'caption' cannot be read"),
    ],
)
def test_what_is_no_table_is_named(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = written_text(tmp_path, content, name)
    with pytest.raises(ValueError, match=message):
        {".csv": csv_table, ".jsonl": jsonl_table}[path.suffix](path)


def test_comparisons_in_csv_have_labels_and_users(folder: Path) -> None:
    content = "jpg_0,jpg_1,caption,label_0,label_0_detail,user_id\na.png,b.png,007,0.5,,12\n"
    found = Comparisons(written_text(folder, content, "metadata.csv"))[0]
    assert (found.prompt, found.user, found.labels["overall"]) == ("007", "12", 0.5)


def test_prompts_are_read_by_the_same_rules(tmp_path: Path) -> None:
    assert load_prompts(written_text(tmp_path, "\ufeffprompt,n\n007,1\nnull,2\n")) == ["007", "null"]
    assert load_prompts(written_text(tmp_path, "\ufeffa\u2028b\r\n\r\nc\x0cd\n", "t.txt")) == ["a\u2028b", "c\x0cd"]


# -- what is left out, or refused before the first step --------------------------------------------------------------


def test_rows_without_caption_are_left_out_and_named(tmp_path: Path) -> None:
    captions = ["x", None, "y", "", "z", "  "]
    path = written(tmp_path / "p.parquet", rows(6, caption=captions))
    for found in (load_pairs(path), streamed(path)):
        assert found.captions() == ["x", "y", "z"]
        assert found.counts == {"rows": 6, "without label": 0, "ties": 0, "without caption": 3}
        assert [where.split(", ")[-1] for where in found.uncaptioned] == ["row 1", "row 3", "row 5"]


@pytest.mark.parametrize("open_pairs", [load_pairs, streamed])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("weight", -1.0, "row 3: weight = -1.0 is wrong: expected a number of at least 0"),
        ("label_0", float("nan"), "row 3: label_0 = nan is wrong"),
        ("label_1", 1.0, r"row 3: label_0 = 1\.0 and label_1 = 1\.0 contradict"),
    ],
)
def test_a_wrong_row_is_named_when_the_pairs_are_opened(
    open_pairs: Callable[[Path], Any], column: str, value: Any, message: str, tmp_path: Path
) -> None:
    table = rows(6, label_0=[1.0] * 6, label_1=[0.0] * 6, weight=[None] * 5 + [2.0])
    table[column][3] = value
    with pytest.raises(ValueError, match=message):
        open_pairs(written(tmp_path / "p.parquet", table))


def test_a_missing_picture_is_named_when_the_pairs_are_opened(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"row 1, column rejected: image .*c\.png cannot be read"):
        pairs(folder, f"{HEADER}\na.png,b.png,x\na.png,c.png,y\n")
