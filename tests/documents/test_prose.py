"""Pages can be read: lines that fit a screen, links that lead somewhere, code that is not wider than it must be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents.pages import ROOT

MOST_COLUMNS, MOST_COLUMNS_OF_CODE = 120, 140
EVERY_PAGE = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("runs", "build") for part in path.relative_to(ROOT).parts)
)

_LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def lines(page: Path, of_code: bool) -> list[str]:
    """A page's lines, by number: code (fenced or indented), or the rest without tables and HTML comments."""
    found, fenced = [], False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found += [f"{number}: {line}"] if of_code else []
        elif not line.startswith(("|", "<!--")):
            found += [] if of_code else [f"{number}: {line}"]
    return found


def width(numbered: str) -> int:
    return len(numbered.partition(": ")[2])


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub calls them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", EVERY_PAGE, ids=relative)
def test_no_line_of_prose_is_wider_than_120_columns(page: Path) -> None:
    assert not [line for line in lines(page, of_code=False) if width(line) > MOST_COLUMNS]


@pytest.mark.parametrize("page", EVERY_PAGE, ids=relative)
def test_no_line_of_code_is_wider_than_140_columns(page: Path) -> None:
    assert not [line for line in lines(page, of_code=True) if width(line) > MOST_COLUMNS_OF_CODE]


@pytest.mark.parametrize("page", EVERY_PAGE, ids=relative)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    broken = []
    for target in ("".join(found) for found in _LINK.findall(page.read_text())):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if "://" not in target and (not there.exists() or (anchor and anchor not in anchors(there))):
            broken.append(target)
    assert not broken


def test_cards_of_the_package_are_among_the_pages() -> None:
    assert {"README.md", "scenes-vp", "evidence"} <= {part for page in EVERY_PAGE for part in page.parts}
