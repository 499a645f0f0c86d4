"""One pipeline in the three layouts that people have it in, and pairs to train on."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusion_align.adapters import load_adapter
from tests.original_layout import original_tensors

from .watched import run_watched

#: Files without a variant's name, fp16 files only, one file in the original layout.
LAYOUTS = ("folder", "fp16", "single")
VARIANTS: Mapping[str, str | None] = MappingProxyType({"folder": None, "fp16": "fp16"})
#: A weight file's name, with or without a variant.
WEIGHTS = re.compile(r"(?P<stem>model|diffusion_pytorch_model)(\.(?P<variant>\w+))?\.safetensors")


@contextmanager
def laid_out(folder: Path, layout: str, work: Path) -> Iterator[list[str]]:
    """Inside, flags that name the model of ``folder`` in another layout. It lies in ``work``; a single file is deleted.

    Raises:
        ValueError: a part has no weights in one file, or several and none without a variant's name.
    """
    place = work / f"model-{layout}"
    if layout != "single":
        yield ["--model", str(linked(folder, place, VARIANTS[layout]))]
        return
    configs, file = linked(folder, place, None, weights=False), work / "model.safetensors"
    run_watched(lambda: write_single_file(folder, file), f"writing {file}")
    try:
        yield ["--model", str(file), "--model-config", str(configs)]
    finally:
        file.unlink()


def linked(folder: Path, place: Path, variant: str | None, weights: bool = True) -> Path:
    """``place``, with links to the files of a pipeline's ``folder``, whose weights are named as ``variant``."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        name = path.name
        if path.suffix == ".safetensors":
            if not weights or path not in chosen(path.parent):
                continue
            stem = WEIGHTS.fullmatch(name)["stem"]  # type: ignore[index]
            name = f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"
        link = place / path.parent.relative_to(folder) / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    return place


def chosen(part: Path) -> list[Path]:
    """The weight file of a part's folder: the only one, or the one without a variant's name."""
    files = [path for path in sorted(part.glob("*.safetensors")) if WEIGHTS.fullmatch(path.name)]
    unnamed = [path for path in files if WEIGHTS.fullmatch(path.name)["variant"] is None]  # type: ignore[index]
    found = files if len(files) == 1 else unnamed
    if len(found) != 1:
        raise ValueError(f"{part}: expected one weight file, found {', '.join(path.name for path in files) or 'none'}")
    return found


def write_single_file(folder: Path, file: Path) -> None:
    """The pipeline in ``folder`` as one float16 file in the layout of CompVis and Stability."""
    pipeline = load_adapter(str(folder), dtype=torch.float16).pipeline
    save_file({name: tensor.half().contiguous() for name, tensor in original_tensors(pipeline).items()}, file)


def write_pairs(folder: Path, count: int = 4, side: int = 256) -> Path:
    """A folder with one parquet file of pairs in Pick-a-Pic's columns; returns the folder."""
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        small = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        return file.getvalue()

    rows = [
        {"caption": f"a photo of thing {i}", "jpg_0": picture(), "jpg_1": picture(), "label_0": 1.0, "label_1": 0.0}
        for i in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    return folder
