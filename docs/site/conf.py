"""Sphinx's settings. Sources lie below the checkout, so that links to README and to results lead where they lead
on GitHub. docs/index.md is the table of contents, for readers of the files and for the site."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import diffusion_align
from diffusion_align.cli import COMMANDS, FLAGS
from diffusion_align.commands.helping.site_pages import commands_page, python_page, settings_page

project = "diffusion-align"
CARD = "diffusion_align/scenes/assets/scenes-vp-words/README.md"  # the one of the shipped models' that a page links
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md", CARD]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "benchmarks", "notebooks", "training"]
smartquotes_action = "qe"  # dashes stay: help texts name flags, and "--out" must not become "–out"
myst_heading_anchors = 6  # links lead to headings by GitHub's names
nitpicky = True

html_theme = "furo"
html_title = "diffusion-align"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_additional_pages = {"index": "to_contents.html"}
templates_path = ["templates"]
html_static_path = ["static"]
html_css_files = ["wide.css"]

#: What stands where a page says ``<!-- made when the site is built: NAME -->``.
MADE: dict[str, Callable[[], str]] = {
    "commands": lambda: commands_page({word: command.text for word, command in COMMANDS.items()}, FLAGS),
    "settings": settings_page,
    "python": lambda: python_page(diffusion_align),
}
_MARK = re.compile(r"^<!-- made when the site is built: (\w+) -->$", re.MULTILINE)
_ENTRY = re.compile(r"^- \[([^\]]+)\]\(([^)]+)\.md\)", re.MULTILINE)


def with_tables_of_contents(text: str) -> str:
    """The contents page with a hidden table for each heading: Sphinx makes the side bar from those."""
    tables = []
    for section in text.split("\n## ")[1:]:
        heading = section.partition("\n")[0]
        entries = "\n".join(f"{name} <{place}>" for name, place in _ENTRY.findall(section))
        tables.append(f"```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{entries}\n```")
    return "\n\n".join([text, *tables])


def complete(app: Any, page: str, source: list[str]) -> None:
    """Put in what is made at build time."""
    source[0] = _MARK.sub(lambda found: MADE[found[1]](), source[0])
    if page == root_doc:
        source[0] = with_tables_of_contents(source[0])


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", complete)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
