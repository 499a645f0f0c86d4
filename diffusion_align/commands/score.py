"""``diffusion-align score``: pictures in, a table of rewards out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusion_align.data.reading.rows import image_bytes
from diffusion_align.data.tables import open_source
from diffusion_align.files import append_rows, check_free, check_writable, read_journal, write_parquet, write_whole
from diffusion_align.pictures import SUFFIXES, CorruptImageError, decoded_picture, opened_picture
from diffusion_align.quiet import progress_bar
from diffusion_align.rewards import RewardScorer, load_scorer

from .console import conclude, note
from .options import ScoreOptions

#: Column of ``OUT.partial`` that the table does not have.
MARK = "mark"


@dataclass(frozen=True)
class Item:
    """One picture to score.

    Attributes:
        key: names it in the table.
        content: the encoded picture; or why there is none.
        where: what messages call it.
    """

    key: str
    prompt: str
    content: bytes | CorruptImageError
    where: str

    def picture(self) -> Image.Image:
        """In RGB.

        Raises:
            CorruptImageError: it cannot be decoded.
        """
        if isinstance(self.content, CorruptImageError):
            raise self.content
        return decoded_picture(self.content, self.where)

    def mark(self) -> str:
        """Hash of what the scores depend on, beside the scorers."""
        content = self.content if isinstance(self.content, bytes) else str(self.content).encode()
        return hashlib.sha256(json.dumps([self.key, self.prompt]).encode() + content).hexdigest()[:32]


def score_files(options: ScoreOptions) -> Path:
    """Score every picture of ``options.source`` and write the table; returns its path.

    Rows are written as they come to ``OUT.partial``, so that a run that died scores only what is missing; pictures or
    prompts that changed since are missing, too. A picture that cannot be decoded has no scores, but an ``error``; how
    many there are is said at the end.

    Raises:
        ValueError: a picture without a prompt, no picture that can be decoded, a table of another run in
            ``OUT.partial``, an unknown suffix or scorer; the file or row is named.
        FileNotFoundError: no such source or checkpoint.
        FileExistsError: the table is there already.
    """
    out = Path(options.out)
    check_free([out], options.overwrite)
    check_writable(out.parent)
    from diffusion_align.devices import pick_device

    scorers = {name: load_scorer(name, device=pick_device(options.device)) for name in options.scorers}
    needing = [name for name, scorer in scorers.items() if scorer.needs]
    if needing:
        needs = ", ".join(sorted(scorers[needing[0]].needs))
        raise ValueError(f"scorer {needing[0]} needs {needs}, which a table of pictures does not have")
    partial = out.with_name(out.name + ".partial")
    rows = open_partial(partial, {"source": str(options.source), "scorers": list(options.scorers)})
    order: list[str] = []
    waiting: dict[str, Item] = {}

    def score_waiting() -> None:
        scored = dict(zip(waiting, score_batch(scorers, list(waiting.values())), strict=True))
        append_rows(partial, [{MARK: mark} | row for mark, row in scored.items()])
        rows.update(scored)
        bar.update(len(waiting))
        waiting.clear()

    with progress_bar(unit="image", desc="scoring") as bar:
        for item in read_items(options):
            order.append(item.mark())
            if order[-1] in rows:
                bar.update()
                continue
            waiting[order[-1]] = item
            if len(waiting) == options.batch_size:
                score_waiting()
        score_waiting()
    finish(partial, [rows[mark] for mark in order])
    return out


def score_batch(scorers: dict[str, RewardScorer], items: Sequence[Item]) -> list[dict[str, Any]]:
    """A row per picture: image, prompt, each scorer's reward, its std and aspects as SCORER/ASPECT; or its error."""
    table: list[dict[str, Any]] = [{"image": item.key, "prompt": item.prompt} for item in items]
    rows: list[dict[str, Any]] = []
    pictures: list[Image.Image] = []
    for row, item in zip(table, items, strict=True):
        try:
            pictures.append(item.picture())
            rows.append(row)
        except CorruptImageError as error:
            row["error"] = str(error)
    prompts = [row["prompt"] for row in rows]
    for name, scorer in scorers.items() if pictures else ():
        with torch.no_grad():
            output = scorer.score(pictures, prompts)
        columns = {name: output.reward} | {f"{name}/{aspect}": values for aspect, values in output.aspects.items()}
        if output.std is not None:
            columns[f"{name}/std"] = output.std
        for column, values in columns.items():
            for row, value in zip(rows, values.tolist(), strict=True):
                row[column] = value
    return table


def open_partial(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows already written, by their items' marks; torn and damaged lines are cut off. The first line holds the
    settings.

    Rows of 0.1 have no marks and are scored again.

    Raises:
        ValueError: it was begun with other settings, or the line that says them is damaged.
    """
    rows = read_journal(path)
    if not rows:
        append_rows(path, [settings])
        return {}
    if rows[0] != settings:
        raise ValueError(
            f"{path} belongs to a run with another source or other scorers: delete it, or give another --out"
        )
    return {row.pop(MARK): row for row in rows[1:] if MARK in row}


def finish(partial: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the table, at once, in the place of the partial one.

    Raises:
        ValueError: no picture could be decoded.
        OSError: it cannot be written.
    """
    errors = [row["error"] for row in rows if "error" in row]
    if errors:
        note(f"{len(errors)} of {len(rows)} pictures cannot be decoded and have no scores: {'; '.join(errors[:5])}")
    if errors and len(errors) == len(rows):
        raise ValueError(f"no picture can be decoded, e.g. {errors[0]}")
    out = partial.with_name(partial.name.removesuffix(".partial"))
    if out.suffix == ".jsonl":
        write_whole(out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        from datasets import Dataset

        columns = dict.fromkeys(name for row in rows for name in row)
        write_parquet(out, Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns}))
    partial.unlink()


def read_items(options: ScoreOptions) -> Iterator[Item]:
    """Pictures of a folder (in the order of their names), or of a table of pairs, row by row."""
    source = Path(options.source)
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES) if source.is_dir() else []
    if files:
        yield from folder_items(files, options.prompts)
        return
    if source.is_dir() and not any(source.rglob("*.parquet")):
        raise FileNotFoundError(f"{source}: no pictures ({', '.join(SUFFIXES)}) and no parquet files")
    table = open_source(options.source, options.split, streaming=True)
    for number, row in enumerate(table.table):
        for column in ("jpg_0", "jpg_1") if "jpg_0" in row else ("chosen", "rejected"):
            where = f"{table.name}, row {number}, column {column}"
            yield Item(f"{number}/{column}", str(row["caption"]), cell_content(row[column], table.folder, where), where)


def folder_items(files: Sequence[Path], prompts: str | None) -> Iterator[Item]:
    """Prompts come from a file (one per picture, in the order of the names), or from the pictures' own metadata."""
    from diffusion_align.data import load_prompts

    texts = None if prompts is None else load_prompts(prompts)
    if texts is not None and len(texts) != len(files):
        raise ValueError(f"--prompts {prompts}: {len(texts)} prompts for {len(files)} pictures in {files[0].parent}")
    for i, path in enumerate(files):
        content = path.read_bytes()
        prompt = metadata_prompt(content, path) if texts is None else texts[i]
        yield Item(path.name, prompt, content, str(path))


def metadata_prompt(content: bytes, path: Path) -> str:
    """The prompt that ``generate`` wrote into a picture; of one that cannot be read there is none.

    Raises:
        ValueError: it has none.
    """
    try:
        record = opened_picture(content, str(path)).info.get("diffusion-align")
    except CorruptImageError:
        return ""
    if record is None:
        raise ValueError(f"{path}: no prompt in its metadata; give --prompts, a file with one prompt per picture")
    return str(json.loads(record)["prompt"])


def cell_content(value: Any, folder: Path | None, where: str) -> bytes | CorruptImageError:
    """The encoded picture of a table's cell, or why there is none."""
    try:
        return image_bytes(value, folder, where)
    except CorruptImageError as error:
        return error


def run(options: ScoreOptions) -> int:
    """Score the pictures and print the table's file; returns the exit status."""
    table = score_files(options)
    conclude(table, {"table": str(table)})
    return 0
