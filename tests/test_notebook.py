"""The committed notebooks run, and were committed with their pictures."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from .pages import NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short by its own first cell, which reads QUICK."""
    monkeypatch.setenv("QUICK", "1")
    notebook = nbformat.read(path, as_version=4)
    reads = [i for i, cell in enumerate(c for c in notebook.cells if c.cell_type == "code") if '"QUICK"' in cell.source]
    assert reads == [0]
    assert "`QUICK=1`" in notebook.cells[0].source  # and says so
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_shows_pictures(path: Path) -> None:
    outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output.output_type == "error"]


def test_there_are_notebooks() -> None:
    assert "01_quickstart" in [path.stem for path in NOTEBOOKS]
