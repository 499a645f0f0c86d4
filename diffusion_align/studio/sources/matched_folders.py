"""Folders of pictures put side by side: by what their records say, by file name, or by their order; and one folder, by
its prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from diffusion_align.pictures import SUFFIXES, picture_header

from .keyed import opaque
from .units import Gathered, Picture, Unit

Match = Literal["auto", "record", "name", "order"]
#: How a rule is told to the user.
TOLD: Mapping[str, str] = MappingProxyType({
    "record": "matched by the prompt and seed in their records",
    "name": "matched by file name",
    "order": "matched by their order",
})  # fmt: skip


def pictures_in(folder: Path) -> list[Path]:
    """Pictures of a folder, sorted; plots of guidance schedules are none.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()]
    found = [path for path in found if not path.stem.endswith("-schedule")]
    if not found:
        raise FileNotFoundError(f"{folder}: no picture in it ({', '.join(SUFFIXES)})")
    return found


def record_of(path: Path) -> dict[str, Any]:
    """What ``generate`` wrote of a picture, beside it or into it; {} where it says nothing."""
    beside = path.with_suffix(".json")
    try:
        if beside.is_file():
            found = json.loads(beside.read_bytes())
        else:
            found = json.loads(picture_header(path, str(path)).info.get("diffusion-align", "{}"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def prompt_of(path: Path, record: Mapping[str, Any]) -> str | None:
    """From the record, or from NAME.txt beside the picture."""
    if isinstance(record.get("prompt"), str):
        return str(record["prompt"])
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() or None if text.is_file() else None


def match_folders(folders: Sequence[Path], match: Match = "auto") -> Gathered:
    """One unit for the pictures that belong together, one of each folder; of a single folder, those of one prompt.

    Args:
        match: "auto" takes records if all pictures have them, names if they are the same everywhere, else the order.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: pictures without a partner (all are listed), or without a prompt.
    """
    if len(folders) == 1:
        return group_folder(folders[0], match)
    files = [pictures_in(folder) for folder in folders]
    records = [[record_of(path) for path in there] for there in files]
    rule = _rule(files, records) if match == "auto" else match
    keyed = [_by_key(folder, there, said, rule) for folder, there, said in zip(folders, files, records, strict=True)]
    every = {key for there in keyed for key in there}
    alone = sorted(
        f"{folder.name}/{path.name}"
        for folder, there in zip(folders, keyed, strict=True)
        for key, (path, _) in there.items()
        if any(key not in other for other in keyed)
    )
    if alone:
        raise ValueError(f"pictures without a partner ({TOLD[rule]}){_listed(alone)}")
    order = [key for key in keyed[0] if key in every]
    return Gathered(tuple(_unit([there[key] for there in keyed], folders) for key in order), TOLD[rule])


def group_folder(folder: Path, match: Match = "auto") -> Gathered:
    """One unit for the pictures of each prompt in a folder: several seeds of one model.

    Raises:
        FileNotFoundError: the folder is missing or empty.
        ValueError: a picture without a prompt, or a prompt with one picture (all are listed), or another ``match``.
    """
    if match not in ("auto", "record"):
        raise ValueError(f"--match {match}: pictures of one folder are matched by their prompts")
    groups: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {}
    for path in pictures_in(folder):
        record = record_of(path)
        groups.setdefault(_prompt([(path, record)]), []).append((path, record))
    alone = [there[0][0].name for there in groups.values() if len(there) < 2]
    if alone:
        raise ValueError(f"{folder}: the only pictures of their prompts{_listed(alone)}: give a second folder")
    units = tuple(_unit(there, [folder] * len(there)) for there in groups.values())
    return Gathered(units, "pictures of one folder, matched by their prompts")


def _listed(names: Sequence[str]) -> str:
    return f": {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"


def _rule(files: Sequence[Sequence[Path]], records: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    if all({"prompt", "seed"} <= record.keys() for there in records for record in there):
        return "record"
    names = [sorted(path.stem for path in there) for there in files]
    return "name" if all(found == names[0] for found in names) else "order"


def _by_key(
    folder: Path, files: Sequence[Path], records: Sequence[Mapping[str, Any]], rule: str
) -> dict[Any, tuple[Path, Mapping[str, Any]]]:
    """Pictures by what they are matched by.

    Raises:
        ValueError: two of a folder have the same, or a record lacks it.
    """
    keys: dict[str, Callable[[int], Any]] = {
        "record": lambda i: (records[i].get("prompt"), records[i].get("seed")),
        "name": lambda i: files[i].stem,
        "order": lambda i: i,
    }
    found: dict[Any, tuple[Path, Mapping[str, Any]]] = {}
    for i, path in enumerate(files):
        key = keys[rule](i)
        if rule == "record" and None in key:
            raise ValueError(f"{path}: its record has no prompt and seed: match by name or order")
        if key in found:
            raise ValueError(f"{folder}: {found[key][0].name} and {path.name} are the same ({TOLD[rule]})")
        found[key] = path, records[i]
    return found


def _unit(there: Sequence[tuple[Path, Mapping[str, Any]]], folders: Sequence[Path]) -> Unit:
    prompt = _prompt(there)
    pictures = tuple(
        Picture(path, name=f"{folder.name}/{path.name}", model=_model(record, folder), scale=_scale(record))
        for (path, record), folder in zip(there, folders, strict=True)
    )
    return Unit(opaque(prompt, *(picture.name for picture in pictures)), prompt, pictures)


def _prompt(there: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    """The prompt of pictures that belong together; one of them must say it."""
    for path, record in there:
        if (prompt := prompt_of(path, record)) is not None:
            return prompt
    raise ValueError(f"{there[0][0]}: no prompt is known: expected a record of generate, or its prompt in NAME.txt")


def _model(record: Mapping[str, Any], folder: Path) -> str:
    """The model and its LoRAs, and for pictures without a record their folder."""
    if "model" not in record:
        return folder.name
    strength = record.get("alignment_strength", 1.0)
    loras = [str(lora) for lora in record.get("lora") or ()] if strength else []
    return " + ".join([str(record["model"]), *loras]) + (f" @ {strength:g}" if loras and strength != 1 else "")


def _scale(record: Mapping[str, Any]) -> float | None:
    """A guidance scale, where one number was all there was."""
    scale = record.get("guidance_scale")
    return float(scale) if record.get("guidance") == "constant" and isinstance(scale, int | float) else None
