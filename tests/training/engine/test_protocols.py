"""The loop knows its guests by protocols only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffusion_align.training.engine as engine

FILES = sorted(Path(engine.__path__[0]).glob("*.py"))
GUESTS = re.compile(r"rollout|scorer|reward|pair|evaluator|prompt|picture", re.IGNORECASE)
#: What concerns all guests, and why.
OF_ALL = {
    "PICTURES": "a stream of a sample's seed: one list for all, since no two may have the same number",
    "takes_scorer": "an argument of train, which every config may refuse",
}


def names(tree: ast.AST) -> Iterator[str]:
    """What the code calls things: variables, attributes, arguments, functions, classes, and what is imported."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.alias(name=name):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ImportFrom(module=str(name)):
                yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_engine_names_no_guest(path: Path) -> None:
    found = {name for name in names(ast.parse(path.read_text())) if GUESTS.search(name)}
    assert found <= OF_ALL.keys()
