"""Prompts with their categories: from a file, or one of the sets that people compare models on.

No set comes with the package but that of the embedded world. PartiPrompts is fetched from the hub; the others are read
from the user's disk in the layout of their own repositories.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusion_align.commands.console import note
from diffusion_align.commands.parsing import unknown
from diffusion_align.data import load_prompts
from diffusion_align.data.prompts import COLUMNS
from diffusion_align.data.reading.text_files import read_csv, read_jsonl, text_lines

#: Columns that hold a prompt's category, in order of preference.
CATEGORIES = ("category", "style", "tag")
#: How many prompts of the embedded world are drawn where nobody says.
FRESH = 100
PARTI = "nateraw/parti-prompts"
#: Sets by name, with what is said where one has no path.
SETS: Mapping[str, str] = {
    "scenes": "prompts of the embedded world that no training pair has",
    "parti": f"PartiPrompts, 1,632 prompts in 12 categories; from the hub ({PARTI}) or PartiPrompts.tsv",
    "hpdv2": "a folder with anime.json, concept-art.json, paintings.json and photo.json, 800 prompts each",
    "geneval": "evaluation_metadata.jsonl of GenEval, 553 prompts in 6 tasks",
    "t2i-compbench": "a folder of T2I-CompBench's NAME_val.txt, one category each",
}
#: Sets whose own score needs more than a scorer of pictures.
DETECTORS = {
    "geneval": "prompts only, not the GenEval score: that needs its object detector",
    "t2i-compbench": "prompts only, not the T2I-CompBench score: that needs its detectors and its question answering",
}


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts, and what is known of them.

    Attributes:
        categories: by prompt, where there are any.
        notes: what a reader of results must know.
    """

    prompts: Sequence[str]
    categories: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def first(self, count: int | None) -> PromptSet:
        """Only so many of them."""
        return self if count is None else replace(self, prompts=self.prompts[:count])


def load_set(text: str, fresh: int = FRESH, validation: bool = False) -> PromptSet:
    """A file, SET or SET:PATH.

    Args:
        fresh: how many prompts of the embedded world.
        validation: of the embedded world, those that settings are chosen on.

    Raises:
        FileNotFoundError: neither a file nor a set; a set that must be on the disk and is not.
        ValueError: a file that holds no prompts, or another set's.
    """
    name, _, place = text.partition(":")
    if Path(text).is_file() or name not in SETS:
        return read_prompts(_existing(text))
    if name == "scenes":
        from diffusion_align.scenes.held_out import fresh_prompts

        return PromptSet(fresh_prompts(fresh, fresh)[1 if validation else 0])
    if not place and name != "parti":
        raise FileNotFoundError(f"{name}: {SETS[name]}; give its path as {name}:PATH")
    if place and not Path(place).exists():
        raise FileNotFoundError(f"{text}: {place} is not there; expected {SETS[name]}")
    found = _SET_READERS[name](Path(place) if place else None)
    return replace(found, notes=(DETECTORS[name],)) if name in DETECTORS else found


def read_prompts(path: Path) -> PromptSet:
    """Prompts of a file, with categories where it has a column of them."""
    rows = _rows(path)
    if rows is None:
        return distinct((prompt, "") for prompt in load_prompts(path))
    names = {str(name).lower(): str(name) for row in rows[:1] for name in row}
    prompt = next((names[name] for name in COLUMNS if name in names), None)
    if prompt is None:
        raise ValueError(f"{path}: expected a column {' or '.join(COLUMNS)}, found {', '.join(names) or 'no rows'}")
    category = next((names[name] for name in CATEGORIES if name in names), None)
    pairs = []
    for number, row in enumerate(rows):
        if not isinstance(row.get(prompt), str):
            raise ValueError(f"{path}, row {number}: {prompt} = {row.get(prompt)!r} is wrong: expected text")
        pairs.append((str(row[prompt]), "" if category is None else str(row.get(category) or "")))
    return distinct(pairs)


def distinct(pairs: Iterable[tuple[str, str]]) -> PromptSet:
    """Each prompt once, in the order given; how many stood there twice is said.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, str] = {}
    total = 0
    for prompt, category in pairs:
        if prompt.strip():
            total += 1
            found.setdefault(prompt.strip(), category)
    if not found:
        raise ValueError("no prompt to compare on")
    if total > len(found):
        note(f"{total - len(found)} of {total} prompts stand there twice and count once")
    return PromptSet(list(found), {prompt: category for prompt, category in found.items() if category})


def _existing(text: str) -> Path:
    if Path(text).is_file():
        return Path(text)
    hint = "" if "/" in text or "." in text else f"; {unknown('set', text, SETS)}"
    raise FileNotFoundError(f"--prompts {text}: no such file{hint}")


def _rows(path: Path) -> list[Mapping[str, Any]] | None:
    """Rows of a table; None of a file that ``load_prompts`` reads alone."""
    if path.suffix == ".csv":
        names, lines = read_csv(path)
        return [dict(zip(names, line, strict=True)) for line in lines]
    if path.suffix == ".tsv":
        (_, header), *rest = list(text_lines(path))
        keys = header.split("\t")
        return [dict(zip(keys, line.split("\t"), strict=False)) for _, line in rest]
    if path.suffix == ".jsonl":
        values = [value for _, value in read_jsonl(path)]
        return values if values and all(isinstance(value, dict) for value in values) else None
    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        return [dict(row) for row in table.to_pylist()]
    return None


def _parti(path: Path | None) -> PromptSet:
    if path is not None:
        return read_prompts(path)
    from datasets import load_dataset

    table = load_dataset(PARTI, split="train")
    return distinct(zip(table["Prompt"], table["Category"], strict=True))


def _hpdv2(path: Path | None) -> PromptSet:
    assert path is not None  # load_set
    return _folder(path, sorted(path.glob("*.json")), lambda file: json.loads(file.read_text()))


def _geneval(path: Path | None) -> PromptSet:
    assert path is not None
    return read_prompts(path / "evaluation_metadata.jsonl" if path.is_dir() else path)


def _compbench(path: Path | None) -> PromptSet:
    assert path is not None
    return _folder(path, sorted(path.glob("*_val.txt")), load_prompts)


def _folder(path: Path, files: Sequence[Path], read: Any) -> PromptSet:
    """A file for each category."""
    if not files:
        raise FileNotFoundError(f"{path}: none of the files of the set is in it")
    pairs = []
    for file in files:
        prompts = read(file)
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{file}: expected a list of prompts")
        pairs += [(prompt, file.stem.removesuffix("_val")) for prompt in prompts]
    return distinct(pairs)


_SET_READERS = {"parti": _parti, "hpdv2": _hpdv2, "geneval": _geneval, "t2i-compbench": _compbench}
