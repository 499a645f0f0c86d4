"""Folders of pictures put side by side: by what their records say, by file name, or by their order."""

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
    """One unit for the pictures that belong together, one of each folder.

    Args:
        match: "auto" takes records if all pictures have them, names if they are the same everywhere, else the order.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: fewer than two folders, pictures without a partner (all are listed), or without a prompt.
    """
    if len(folders) < 2:
        raise ValueError("expected two folders of pictures or more, to be put side by side")
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
        raise ValueError(
            f"pictures without a partner ({TOLD[rule]}): {', '.join(alone[:20])}"
            f"{f' and {len(alone) - 20} more' if len(alone) > 20 else ''}"
        )
    order = [key for key in keyed[0] if key in every]
    return Gathered(tuple(_unit([there[key] for there in keyed], folders) for key in order), TOLD[rule])


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
    prompts = [prompt_of(path, record) for path, record in there]
    prompt = next((text for text in prompts if text is not None), None)
    if prompt is None:
        raise ValueError(f"{there[0][0]}: no prompt is known: expected a record of generate, or its prompt in NAME.txt")
    pictures = tuple(
        Picture(path, name=f"{folder.name}/{path.name}", model=_model(record, folder), scale=_scale(record))
        for (path, record), folder in zip(there, folders, strict=True)
    )
    return Unit(opaque(prompt, *(picture.name for picture in pictures)), prompt, pictures)


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
