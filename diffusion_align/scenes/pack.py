"""Put a trained pipeline, scorer or evaluator among the shipped ones, in few bits.

Files that another asset has are not stored again, float weights become float16, and matrices small integers: rows of
``--row-bits``, or differences of ``--difference-bits`` to the same file of ``--parent``. The card (README.md) stays;
everything else that the asset had goes. Assets that name this one in their assembly.json rest on its old
weights: pack them again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from diffusion_align.packed import DIFFERENCE_BITS, ROW_BITS, pack, to_bytes
from diffusion_align.shipped import MANIFEST, PACKED, SHIPPED, Part, asset_folder, parts

CARD = "README.md"

#: A file is packed if that makes it this much of what it was; statistics in float64 do not get there.
WORTH = 0.75

#: Smaller files are not worth a line in the manifest.
SHARED_BYTES = 4096


def put_in(
    source: Path,
    name: str,
    *,
    parent: str | None = None,
    exact: bool = False,
    row_bits: int = ROW_BITS,
    difference_bits: int = DIFFERENCE_BITS,
) -> Path:
    """Store the finished folder ``source`` as the asset ``name``; returns the asset's folder.

    Args:
        parent: another asset, whose files of the same path weights are stored as differences to.
        exact: keep float16 weights as they are.

    Raises:
        FileNotFoundError: there is no ``source``.
        ValueError: an unknown name, bits out of range, or ``source`` is the asset itself.
    """
    target = asset_folder(name)
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; expected a finished pipeline, scorer or evaluator")
    if source.resolve() == target.resolve() or parent == name:
        raise ValueError(f"{name}: an asset cannot be packed from itself")
    stored, bases = shareable(name), {} if parent is None else parts(parent)
    shared: dict[str, str] = {}
    packed: dict[str, str | None] = {}
    contents: dict[str, bytes] = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file() and path.name != CARD):
        path = file.relative_to(source).as_posix()
        if (other := stored.get(file.read_bytes())) is not None:
            shared[path] = other
        elif file.suffix != ".safetensors":
            contents[path] = file.read_bytes()
        else:
            weights = {key: halved(value) for key, value in load_file(file).items()}
            base: Part | None = bases.get(path)
            small = pack(
                weights,
                None if base is None else base.weights(),
                row_bits=row_bits,
                difference_bits=difference_bits,
            )
            plain = file.read_bytes() if same_dtypes(weights, file) else save(weights, {"format": "pt"})
            coded = to_bytes(small)
            if exact or len(coded) > WORTH * len(plain):
                contents[path] = plain
            else:
                packed[path] = None if base is None else f"{parent}/{path}"
                contents[f"{path}{PACKED}"] = coded
    clear(target)
    for path, content in contents.items():
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    if shared or packed:
        manifest = {"shared": shared, "packed": packed}
        (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return target


def halved(value: Tensor) -> Tensor:
    """Weights in float16; statistics in float64, and integers, as they are."""
    return value.half() if value.dtype in (torch.float32, torch.bfloat16) else value


def same_dtypes(weights: dict[str, Tensor], file: Path) -> bool:
    """Whether the safetensors ``file`` holds ``weights`` as they are."""
    return all(value.dtype == weights[key].dtype for key, value in load_file(file).items())


def shareable(name: str) -> dict[bytes, str]:
    """Content of files that assets listed before ``name`` store plainly, and the first that does as "ASSET/PATH"."""
    found: dict[bytes, str] = {}
    for other in SHIPPED[: SHIPPED.index(name)]:
        for path, part in parts(other).items():
            plain = part.stored == asset_folder(other) / path
            if plain and path != CARD and part.stored.stat().st_size >= SHARED_BYTES:
                found.setdefault(part.stored.read_bytes(), f"{other}/{path}")
    return found


def clear(folder: Path) -> None:
    """Remove an asset's old content, but for its card."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != CARD:
            path.unlink()


def size(folder: Path) -> float:
    """MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusion_align.scenes.pack", description=__doc__)
    parser.add_argument("source", type=Path, help="the folder of a finished run")
    parser.add_argument("name", choices=SHIPPED, help="of the asset")
    parser.add_argument("--parent", choices=SHIPPED, help="the asset that it was trained from")
    parser.add_argument("--row-bits", type=int, default=ROW_BITS, help="2 to 8")
    parser.add_argument("--difference-bits", type=int, default=DIFFERENCE_BITS, help="2 to 8")
    parser.add_argument("--exact", action="store_true", help="keep float16 weights as they are")
    args = parser.parse_args()
    target = put_in(
        args.source,
        args.name,
        parent=args.parent,
        exact=args.exact,
        row_bits=args.row_bits,
        difference_bits=args.difference_bits,
    )
    print(f"{target}: {size(args.source):.2f} MiB stored as {size(target):.2f}")


if __name__ == "__main__":
    main()
