"""CONTRIBUTING's recipes work as written: each is added to a copy of the package, and the copy runs its last block."""

from __future__ import annotations

import json
import os
import re
import shutil
import traceback
from pathlib import Path

import pytest

from tests.documents.pages import ROOT, Block, blocks, read_blocks
from tests.processes import forked, found_in

PAGE = ROOT / "CONTRIBUTING.md"
#: Files that are touched, and lines in a table: what the rooms are made for.
COUNTS = {
    "A loss": (1, 0),
    "A scorer": (1, 1),
    "A guider": (1, 0),
    "A model family": (1, 1),
    "An online method": (2, 1),
}


def run_sections(to_run: dict[str, str], package: Path, folder: Path) -> None:
    """Runs every section's block in ``folder`` and writes there of each how it ended."""
    found_in(package)
    os.chdir(folder)
    import diffusion_align  # the copy: what was imported at the start belongs to the checkout

    ended = {"": diffusion_align.__file__}
    for section, code in to_run.items():
        try:
            exec(compile(code, section, "exec"), {"__name__": section})
            ended[section] = "done"
        except BaseException:
            ended[section] = traceback.format_exc()
    (folder / "ended.json").write_text(json.dumps(ended))


def sections() -> dict[str, list[Block]]:
    """Blocks of the page by the heading that they stand under."""
    parts = re.split(r"^### (.+)\n", PAGE.read_text(), flags=re.MULTILINE)[1:]
    found = {title: read_blocks(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}
    return {title: of_section for title, of_section in found.items() if any(block.file for block in of_section)}


def put(block: Block, package: Path) -> None:
    """Write a block where its note says."""
    path = package / block.file
    if not block.place:
        assert not path.exists(), f"{block.file} is there already"
        path.write_text(block.code)
        return
    text = path.read_text()
    if block.place == "appended":
        path.write_text(f"{text}\n\n{block.code}")
        return
    anchor = block.place.removeprefix("below ")
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith(anchor)]
    path.write_text(text.replace(f"{line}\n", f"{line}\n{block.code}", 1))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How the block of each section ended in a copy of the package that has all that the page adds."""
    package, folder = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("run")
    for room in ("diffusion_align", "rewards", "training"):
        shutil.copytree(ROOT / room, package / room, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (package / "diffusion_align" / "scenes" / "assets").symlink_to(ROOT / "diffusion_align" / "scenes" / "assets")
    to_run: dict[str, str] = {}
    for title, of_section in sections().items():
        for block in of_section:
            if block.file:
                put(block, package)
        to_run[title] = "".join(block.code for block in of_section if block.needs_files)
    with forked(run_sections, to_run, package, folder, log=folder / "log") as process:
        process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    found: dict[str, str] = json.loads((folder / "ended.json").read_text())
    assert found.pop("").startswith(str(package))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("title", COUNTS)
def test_a_recipe_works_as_written(title: str, ended: dict[str, str]) -> None:
    assert ended[title] == "done", ended[title]


@pytest.mark.parametrize("title", COUNTS)
def test_a_recipe_touches_as_few_files_as_the_design_says(title: str) -> None:
    of_section = sections()[title]
    lines = [block for block in of_section if block.place.startswith("below ")]
    files = {block.file for block in of_section if block.file} - {block.file for block in lines}
    assert (len(files), sum(len(block.code.splitlines()) for block in lines)) == COUNTS[title]


def test_the_page_has_these_recipes_and_says_the_same_counts() -> None:
    assert list(sections()) == list(COUNTS)
    table = re.findall(r"^\| (an? [\w ]+) \| (\d) \| (\w+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {
        f"A{what[1:]}": (int(files), 0 if lines == "none" else int(lines)) for what, files, lines in table
    } == COUNTS


def test_every_recipe_ends_with_a_block_that_is_run() -> None:
    assert all(of_section[-1].needs_files for of_section in sections().values())
    assert sum(block.needs_files for block in blocks(PAGE, "python")) == len(COUNTS)
