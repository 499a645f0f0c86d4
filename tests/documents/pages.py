"""What README, docs and notebooks show a reader: Python blocks and command lines."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
_INLINE = re.compile(r"`(diffusion-align [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: as written after the fence.
        code: its text.
        note: of the HTML comment right above it; "" where there is none.
    """

    language: str
    code: str
    note: str

    @property
    def not_run(self) -> str:
        """Why the block cannot be run where tests are; "" if it can."""
        found = re.fullmatch(r"not run: (\S.*)", self.note)
        return found[1] if found else ""

    @property
    def file(self) -> str:
        """Which file of the package the block belongs to; "" if to none."""
        found = re.match(r"file: ([\w/.]+)", self.note)
        return found[1] if found else ""

    @property
    def place(self) -> str:
        """Where in ``file``: "appended", "below TEXT", or "" for the whole of a new one."""
        return self.note.partition(", ")[2]

    @property
    def needs_files(self) -> bool:
        """Whether the block runs in a package that has the files above it."""
        return self.note == "run with these files"

    @property
    def runs_alone(self) -> bool:
        """Whether the block runs in the package as it is."""
        return not (self.not_run or self.file or self.needs_files)


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of ``page`` in that language, from top to bottom."""
    return [block for block in read_blocks(page.read_text()) if block.language == language]


def read_blocks(text: str) -> list[Block]:
    """All fenced blocks of a page's text, from top to bottom."""
    return [Block(found["language"], found["code"], found["note"] or "") for found in _BLOCK.finditer(text)]


def command_lines(page: Path) -> list[list[str]]:
    """Arguments of every ``diffusion-align ...`` on a page or in a notebook, whoever launches it."""
    if page.suffix == ".ipynb":
        prose = "\n".join(cell.source for cell in nbformat.read(page, as_version=4).cells)
        lines: list[str] = []
    else:
        prose = page.read_text()
        lines = [line for block in blocks(page, "bash") for line in block.code.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in [*lines, *_INLINE.findall(prose)]]
    programs = ("diffusion-align", "diffusion_align.cli")
    return [
        words[words.index(program) + 1 :]
        for words in found
        for program in programs
        if program in words and words[0] not in ("pip", "hf")
    ]
