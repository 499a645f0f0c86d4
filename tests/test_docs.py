"""Code in the docs that says it is executed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
MARKED = re.compile(r"<!-- executed by tests/test_docs.py -->\n```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["rewards"])
def test_marked_examples_run_and_are_short(page: str) -> None:
    found = MARKED.findall((DOCS / f"{page}.md").read_text())
    assert found
    for code in found:
        assert len(code.splitlines()) < 40
        names: dict[str, Any] = {"__name__": "example"}
        exec(compile(code, f"docs/{page}.md", "exec"), names)
