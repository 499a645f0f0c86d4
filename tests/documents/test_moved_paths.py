"""docs/moved-paths.md: what it says is there now is there, and what it says has moved has gone."""

from __future__ import annotations

import ast
import re

import pytest

from tests.test_layers import MODULES, PACKAGE, ROOT

TABLE = (ROOT / "docs" / "moved-paths.md").read_text().partition("\n## Moved\n")[2]
#: Folders may have the name that a file had.
ROOMS = {name for name, path in MODULES.items() if path.name == "__init__.py"}
ROWS = re.findall(rf"^\| `{PACKAGE}\.(\S+)` \| `{PACKAGE}\.(\S+)` \|$", TABLE, re.MULTILINE)


def exists(dotted: str) -> bool:
    """Whether a path below the package is a module, or a name at the top of one."""
    if dotted in MODULES:
        return True
    module, _, name = dotted.rpartition(".")
    return module in MODULES and name in names(MODULES[module].read_text())


def names(source: str) -> set[str]:
    """What a module defines at its top."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def test_the_table_has_its_rows() -> None:
    assert len(ROWS) == TABLE.count("\n| `") > 100


@pytest.mark.parametrize("now", sorted({now for _, now in ROWS}))
def test_a_moved_name_is_where_the_page_says(now: str) -> None:
    assert exists(now)


@pytest.mark.parametrize("before", sorted(before for before, _ in ROWS if before not in ROOMS))
def test_a_name_that_moved_is_not_in_its_old_place(before: str) -> None:
    assert not exists(before)
