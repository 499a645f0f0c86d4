"""The committed notebooks run, and were committed with their pictures, which were made small."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nbformat
import numpy as np
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from diffusion_align.scenes.world.grammar import parse_prompt, sample_scene
from diffusion_align.scenes.world.render import render
from tests.documents.pages import NOTEBOOKS

#: Pictures take few sampling steps where a notebook does not say how many.
FEW_STEPS = """
from functools import partial
import diffusion_align
for name in ("SamplingSettings", "generate"):
    setattr(diffusion_align, name, partial(getattr(diffusion_align, name), num_inference_steps=3))
"""
SCRIPT = Path(__file__).parent.parent / "notebooks" / "shrink.py"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelManager]:
    """A process for notebooks, which cut themselves short."""
    monkeypatch.setenv("QUICK", "1")
    manager = KernelManager()
    manager.start_kernel()
    yield manager
    manager.shutdown_kernel(now=True)


def how_it_ended(path: Path, kernel: KernelManager, folder: Path) -> str:
    """What went wrong when the notebook ran in ``folder``; "" for nothing. It finds no names of one that ran before."""
    folder.mkdir()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n%cd {folder}\n{FEW_STEPS}"))
    try:
        NotebookClient(notebook, timeout=300, km=kernel).execute()
    except CellExecutionError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_the_notebooks_run(kernel: KernelManager, tmp_path: Path) -> None:
    """One after another in one process: only the first waits for the imports."""
    ended = {path.stem: how_it_ended(path, kernel, tmp_path / path.stem) for path in NOTEBOOKS}
    assert ended == {path.stem: "" for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_can_be_cut_short(path: Path) -> None:
    """By its first cell, which reads QUICK."""
    cells = nbformat.read(path, as_version=4).cells
    reads = [i for i, cell in enumerate(c for c in cells if c.cell_type == "code") if '"QUICK"' in cell.source]
    assert reads == [0]
    assert "`QUICK=1`" in cells[0].source  # and says so


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_shows_pictures(path: Path) -> None:
    outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output.output_type == "error"]


def test_there_are_notebooks() -> None:
    assert "01_quickstart" in [path.stem for path in NOTEBOOKS]


@pytest.fixture(scope="module")
def shrink() -> ModuleType:
    """notebooks/shrink.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("shrink", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def picture() -> bytes:
    """A PNG of a scene, large and smooth: thousands of colours."""
    scene = sample_scene(
        parse_prompt("a large red star left of a small blue ring on a dark background"), np.random.default_rng(3)
    )
    large = Image.fromarray(render(scene)).resize((256, 256), Image.Resampling.BICUBIC)
    return png(large)


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)


def test_a_picture_gets_smaller_and_looks_the_same(shrink: ModuleType, picture: bytes) -> None:
    small = shrink.small_png(picture)
    assert len(small) < 0.75 * len(picture)
    assert np.abs(pixels(small) - pixels(picture)).mean() < 2  # of 255


def test_a_small_picture_stays_as_it_is(shrink: ModuleType, picture: bytes) -> None:
    small = shrink.small_png(picture)
    assert shrink.small_png(small) == small


def test_transparent_parts_become_white(shrink: ModuleType) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 4), dtype=np.uint8)
    noise[:32, :, 3] = 0
    assert (pixels(shrink.small_png(png(Image.fromarray(noise))))[:32] > 250).all()


def test_a_notebook_keeps_one_small_form_of_each_picture(shrink: ModuleType, picture: bytes, tmp_path: Path) -> None:
    data = {"image/png": base64.b64encode(picture).decode(), "image/jpeg": "AAAA", "text/plain": "a star"}
    cell = nbformat.v4.new_code_cell("show()", outputs=[nbformat.v4.new_output("display_data", data)])
    path = tmp_path / "notebook.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    shrink.shrink(path)
    (output,) = nbformat.read(path, as_version=4).cells[0].outputs
    assert output.data.keys() == {"image/png", "text/plain"}
    assert base64.b64decode(output.data["image/png"]) == shrink.small_png(picture)


def test_another_kind_of_file_is_refused_by_name(shrink: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plot\.svg: expected a \.png or \.ipynb file"):
        shrink.shrink(tmp_path / "plot.svg")
