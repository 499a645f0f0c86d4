"""The house: which room may import from which, no circles between files, and rooms that stay small.

docs/architecture.md shows the same table. Imports inside functions count like those at the top. Imports under
``TYPE_CHECKING`` count for the layers, not for the circles: they are never run, but they say what a room knows.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "diffusion_align"
#: Rooms that lie beside the package and are installed into it.
MAPPED = ("rewards", "training")

#: Bottom to top. A room imports from itself and from rooms of the lines above it in this list, not from its neighbours.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("packed", "hardware", "devices", "environment", "host_memory", "pictures", "quiet", "names", "showing"),
    ("files",),
    ("shipped",),
    ("process",),
    ("adapters", "objectives"),
    ("data",),
    ("rewards",),
    ("guidance",),
    ("sampling",),
    ("evaluation",),
    ("scenes",),
    ("training.engine",),
    ("training.policy",),
    ("training.pairs", "training.online", "training.scorers", "training.evaluators"),
    ("training",),
    ("studio.sources",),
    ("studio.labels",),
    ("commands",),
    ("studio",),
    ("cli",),
    ("__main__",),
)

MOST_FILES, MOST_LINES, MOST_IN_TRAINING = 14, 400, 12

#: Names of files that may occur in several rooms, and why.
SHARED_NAMES = {
    "__init__": "a room's door",
    "__main__": "python -m",
    "config": "each room of training has its settings",
    "method": "each room of training has its losses",
    "job": "each room of training has its way from settings to a run",
    "cache": "encoded pairs (data), and the command that encodes them",
    "loading": "models, and pairs: each beside what it loads",
    "prompts": "where prompts come from (data), and what models read of them (adapters)",
    "pairs": "data reads what scenes.make makes",
    "comparisons": "data reads what scenes.make makes",
    "ratings": "data reads what scenes.make makes",
    "flow": "the path, and the training of the model that goes by it",
}

#: What only ``process`` may write: the noise schedule's table, square roots of alpha_bar, and what kind of prediction
#: an output is.
ALGEBRA = re.compile(
    r"alphas_cumprod|(?:alpha_bar|signal|level|levels|next_level|ab|ab_next)(?:\[[^]]*\])?\s*(?:\.sqrt\(\)|\*\* ?0\.5)"
    r"|sqrt\(\s*(?:alpha_bar|signal|level)|\(1 - (?:alpha_bar|signal|level|ab)\w*\)(?:\.sqrt\(\)| ?\*\* ?0\.5)"
    r"|== \"(?:epsilon|v_prediction|sample)\""
)


def files() -> list[Path]:
    found = [*(ROOT / PACKAGE).rglob("*.py"), *(path for top in MAPPED for path in (ROOT / top).rglob("*.py"))]
    return sorted(path for path in found if "assets" not in path.parts)


def module_name(path: Path) -> str:
    """Below the package, e.g. ``training.engine.loop``; of a package its own name, of the top one ""."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == PACKAGE else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in files()}


@cache
def imports(path: Path) -> tuple[tuple[str, bool, int], ...]:
    """Modules of the package that ``path`` imports: name, whether for type checking only, and line."""
    return tuple(read_imports(path))


def read_imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    tree = ast.parse(path.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    own = module_name(path).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        elif isinstance(node, ast.ImportFrom):
            given = (node.module or "").split(".") if node.module else []
            if not node.level and given[:1] != [PACKAGE]:
                continue
            base = package[: len(package) - node.level + 1] + given if node.level else given[1:]
            whole = [[*base, alias.name] for alias in node.names]
            targets = [name if ".".join(name) in MODULES else base for name in whole]
        else:
            continue
        for target in targets:
            yield ".".join(part for part in target if part), id(node) in for_types, node.lineno


def room(module: str) -> str | None:
    """The longest room of the table that holds ``module``; None for the package's own front door."""
    rooms = [name for layer in LAYERS for name in layer if module == name or module.startswith(name + ".")]
    if not rooms and module:
        raise AssertionError(f"{module} is in no room of the table")
    return max(rooms, key=len) if module else None


def height(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.slow
def test_every_room_imports_from_rooms_below_it_only() -> None:
    wrong = []
    for module, path in MODULES.items():
        here = room(module)
        if here is None:
            continue
        for target, _, line in imports(path):
            there = room(target)
            if there is None or there == here:
                continue
            if height(there) >= height(here):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_over_others() -> None:
    graph = {
        module: {target for target, for_types, _ in imports(path) if not for_types and target != module}
        for module, path in MODULES.items()
        if module  # the front door opens every room, and none goes out by it
    }
    circles, done = [], set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            circles.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                walk(target, [*trail, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    assert not circles, "\n".join(circles)


def test_training_is_surveyable() -> None:
    entries = {path.name for path in (ROOT / "training").iterdir() if path.name != "__pycache__"}
    assert len(entries) <= MOST_IN_TRAINING, sorted(entries)


def test_no_folder_has_more_files_than_one_can_survey() -> None:
    others = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    folders = {path.parent for path in [*files(), *others]}
    full = {
        str(folder.relative_to(ROOT)): n for folder in folders if (n := len(list(folder.glob("*.py")))) > MOST_FILES
    }
    assert not full


def test_no_file_is_longer_than_400_lines() -> None:
    tests = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in [*files(), *tests]}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_file_names_occur_once_or_with_a_reason() -> None:
    names: dict[str, list[str]] = {}
    for path in files():
        names.setdefault(path.stem, []).append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in names.items() if len(found) > 1 and name not in SHARED_NAMES}


def test_the_docs_show_this_table() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    shown = re.search(r"<!-- layers: tests/test_layers.py -->\n\n```\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    table = [tuple(line.split("  ")[0].split(", ")) for line in shown.group(1).splitlines()]
    assert table == list(LAYERS)


@pytest.mark.parametrize(
    "path", [p for p in files() if "process" not in p.parts], ids=lambda p: module_name(p) or "top"
)
def test_only_process_knows_the_noise_schedules_algebra(path: Path) -> None:
    found = ALGEBRA.findall(
        "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    )
    assert not found, found
