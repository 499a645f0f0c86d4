"""The reader's walks of docs/architecture.md: they go down the layers, from file to file, and name what is there."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import pytest

from tests.test_layers import MODULES, ROOT, height, imports, module_name, room

PAGE = ROOT / "docs" / "architecture.md"
WALKS = ("From a command to the first loss", "From a prompt to a picture with dynamic guidance")

_STEP = re.compile(r"^\d+\. `([\w/.]+\.py)` \(((?:`\w+`(?:, )?)+)\):", re.MULTILINE)
_ADDRESS = re.compile(r"\"(\.[\w.]+):\w+\"")


@dataclass(frozen=True)
class Step:
    """A file of a walk, and what the page names of it."""

    file: str
    names: tuple[str, ...]

    @property
    def module(self) -> str:
        return module_name(ROOT / self.file)


def steps(walk: str) -> list[Step]:
    text = PAGE.read_text().partition(f"## {walk}\n")[2].partition("\n## ")[0]
    found = [Step(file, tuple(re.findall(r"\w+", names))) for file, names in _STEP.findall(text)]
    assert len(found) == len(re.findall(r"^\d+\. ", text, re.MULTILINE)) > 10
    return found


def opened(module: str) -> set[str]:
    """What a file imports, or names by an address such as ".pairs.job:dpo_job" (cli.py: by the word of a command)."""
    text = MODULES[module].read_text()
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    addresses = {(package + found).strip(".") for found in _ADDRESS.findall(text)}
    if module == "cli":
        addresses |= {f"commands.{word}" for word in re.findall(r"\"(\w+)\"", text)} & set(MODULES)
    return {target for target, _, _ in imports(MODULES[module])} | addresses


def behind(module: str) -> set[str]:
    """What a file opens, and what the rooms' doors among it pass on."""
    doors = {name for name in opened(module) if MODULES[name].name == "__init__.py"}
    return opened(module) | {name for door in doors for name in opened(door)}


@pytest.mark.parametrize("walk", WALKS)
def test_no_step_of_a_walk_goes_back_up_a_layer(walk: str) -> None:
    heights = [height(room(step.module) or "") for step in steps(walk)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == height("cli")
    assert heights[-1] == height("process")


@pytest.mark.parametrize("walk", WALKS)
def test_every_file_of_a_walk_is_opened_by_one_before_it(walk: str) -> None:
    modules = [step.module for step in steps(walk)]
    lost = [
        module
        for i, module in enumerate(modules)
        if i and not any(module in behind(earlier) for earlier in modules[:i])
    ]
    assert not lost


@pytest.mark.parametrize("step", [step for walk in WALKS for step in steps(walk)], ids=lambda step: step.file)
def test_what_a_step_names_is_in_its_file(step: Step) -> None:
    tree = ast.walk(ast.parse((ROOT / step.file).read_text()))
    defined = {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert set(step.names) <= defined
