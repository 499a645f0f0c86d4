"""The committed notebooks run, and were committed with their pictures."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
#: What takes minutes in the notebooks takes seconds here.
SHORTER = {
    "max_steps=100": "max_steps=2",
    "max_steps=20": "max_steps=1",
    "eval_steps=50": "eval_steps=1",
    "eval_steps=10": "eval_steps=1",
    "PICTURES = 64": "PICTURES = 4",
    "rendered_rows(400": "rendered_rows(32",
    "rendered_rows(100": "rendered_rows(8",
    "[:100]": "[:4]",
    "STEPS = 20": "STEPS = 2",
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    assert any(short in cell.source for cell in notebook.cells for short in SHORTER.values())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_shows_pictures(path: Path) -> None:
    outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output.output_type == "error"]


def test_there_are_notebooks() -> None:
    assert "01_quickstart" in [path.stem for path in NOTEBOOKS]
