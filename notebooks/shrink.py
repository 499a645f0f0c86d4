"""Make pictures small: ``python notebooks/shrink.py docs/images/*.png notebooks/*.ipynb``, in place.

A picture gets a palette of its own best 256 colours. In a notebook a picture's second form (JPEG beside PNG) goes.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

COLOURS = 256


def small_png(content: bytes) -> bytes:
    """A PNG with a palette, or ``content`` itself where that is no larger. Transparency is put on white."""
    picture = Image.open(io.BytesIO(content))
    if picture.mode == "P":
        return content
    flat = Image.new("RGBA", picture.size, "white")
    flat.alpha_composite(picture.convert("RGBA"))
    few = flat.convert("RGB").quantize(COLOURS, Image.Quantize.MEDIANCUT, kmeans=2)
    small = io.BytesIO()
    few.save(small, "PNG", optimize=True)
    return min(small.getvalue(), content, key=len)


def shrink_outputs(notebook: Any) -> None:
    """Make the pictures in the outputs of a notebook small, one form of each."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data.pop("image/jpeg", None)
                data["image/png"] = base64.b64encode(small_png(base64.b64decode(data["image/png"]))).decode("ascii")


def shrink(path: Path) -> None:
    """Rewrite a .png or .ipynb file.

    Raises:
        ValueError: it is neither.
    """
    if path.suffix == ".png":
        path.write_bytes(small_png(path.read_bytes()))
    elif path.suffix == ".ipynb":
        notebook = nbformat.read(path, as_version=4)
        shrink_outputs(notebook)
        nbformat.write(notebook, path)
    else:
        raise ValueError(f"{path}: expected a .png or .ipynb file")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        before = Path(name).stat().st_size
        shrink(Path(name))
        print(f"{name}: {before / 1024:.0f} KiB, now {Path(name).stat().st_size / 1024:.0f}")
