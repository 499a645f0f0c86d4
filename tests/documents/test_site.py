"""The docs site: what it is made from is whole, and Sphinx builds it without a warning, loading nothing from outside.

Links and anchors within the project are checked by ``test_prose.py``, without building.
"""

from __future__ import annotations

import re
import resource
from dataclasses import fields
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

import diffusion_align
from diffusion_align.cli import COMMANDS, FLAGS
from diffusion_align.commands.helping.command_tree import command_tree
from diffusion_align.commands.helping.site_pages import commands_page, settings_page
from diffusion_align.training.methods import METHODS, config_class
from tests.documents.pages import ROOT
from tests.processes import forked

DOCS = ROOT / "docs"
CONTENTS = (DOCS / "index.md").read_text()
SECTIONS = ["Start", "Guides", "Methods", "Reference", "Troubleshooting", "Evidence and limits"]
SYMPTOMS = DOCS / "troubleshooting.md"
#: Of a core, so that what else runs beside the tests does not count.
MOST_SECONDS = 60


def test_the_table_of_contents_has_every_page_once() -> None:
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+\.md)\): \w", CONTENTS, re.MULTILINE)
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"index.md"}
    assert pages <= set(listed)
    assert len(listed) == len(set(listed)) == CONTENTS.count("\n- ")
    assert re.findall(r"^## (.+)$", CONTENTS, re.MULTILINE) == SECTIONS


@pytest.fixture(scope="module")
def commands() -> str:
    return commands_page({word: command.text for word, command in COMMANDS.items()}, FLAGS)


def test_the_page_of_commands_has_every_command_with_its_flags(commands: str) -> None:
    assert re.findall(r"^## ([\w-]+)$", commands, re.MULTILINE) == list(COMMANDS)
    tables = dict(re.findall(r"^##+ (?:`diffusion-align )?([\w -]+)`?$(.*?)(?=^##|\Z)", commands, re.M | re.S))
    for words, flags in command_tree().items():
        if not words.startswith("train") and words != "cache":
            told = set(re.findall(r"^\| `(--[\w-]+)` \|", tables[words], re.MULTILINE))
            switches = {f"--no-{flag.name[2:]}" for flag in flags if flag.is_switch}
            assert told == {flag.name for flag in flags} - switches, words


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    """The sections of the page of settings, by heading."""
    return dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", settings_page(), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("method", METHODS)
def test_the_page_of_settings_has_every_setting_of_a_method_with_its_default_and_help(
    method: str, settings: dict[str, str]
) -> None:
    told: dict[str, list[str]] = {}
    for name in reversed(re.findall(r"\[(\w+)\]\(#\w+\)", settings[method])):
        rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*?) \| (.+) \|$", settings[name], re.MULTILINE)
        told |= {setting: rest for setting, *rest in rows}
    config = config_class(method)()
    shown = [field for field in fields(config) if field.name != "method"]
    assert {field.name for field in shown} <= set(told)
    for field in shown:
        value = getattr(config, field.name)
        if isinstance(value, int | float):
            assert told[field.name][1] == f"`{str(value).lower()}`", field.name


def test_errors_that_troubleshooting_quotes_are_said_by_the_package() -> None:
    quoted = re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", SYMPTOMS.read_text(), flags=re.M | re.S), re.M)
    code = "\n".join(path.read_text() for top in ("training", "diffusion_align") for path in (ROOT / top).rglob("*.py"))
    assert len(quoted) > 5
    assert not [text for text in quoted if text not in code]


def test_files_that_a_run_is_said_to_leave_are_named_in_its_code() -> None:
    rows = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", (DOCS / "run-files.md").read_text(), re.MULTILINE)
    names = {name.strip("/").removesuffix("STEP") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    files = [path for top in ("training", "diffusion_align") for path in (ROOT / top).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files)
    assert len(names) > 15
    assert not [
        name for name in names if f'"{name}"' not in code and f'"{name.removesuffix(".safetensors")}"' not in code
    ]


def test_every_symptom_has_a_command() -> None:
    _, *symptoms = SYMPTOMS.read_text().split("\n## ")
    assert len(symptoms) >= 7
    assert not [text.partition("\n")[0] for text in symptoms if "```bash\n" not in text]


class Loads(HTMLParser):
    """What a page loads by itself: scripts, style sheets, pictures, frames; not where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [given.get("src") or "", given.get("srcset") or "", given.get("data") or ""]
        if tag == "link":
            self.addresses.append(given.get("href") or "")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    site, log = tmp_path / "site", tmp_path / "log"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["-W", "--keep-going", "-E", "-q", "-c", "docs/site", "-d", str(tmp_path / "doctrees"), ".", str(site)]
    with forked(import_module("sphinx.cmd.build").main, command, log=log) as done:
        done.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.exitcode, log.read_text()) == (0, "")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MOST_SECONDS
    pages = {str(page.relative_to(site)): page.read_text() for page in site.rglob("*.html")}
    assert {"index.html", "docs/index.html", "docs/troubleshooting.html", "README.html"} <= set(pages)
    assert "--num-prompts" in pages["docs/commands.html"]
    assert "per_device_train_batch_size" in pages["docs/settings.html"]
    shown = set(re.findall(r'<section id="([\w-]+)"', pages["docs/python.html"]))
    assert {name.lower().replace("_", "-") for name in diffusion_align.__all__} <= shown
    outside = {address for text in pages.values() for address in Loads(text).addresses if "//" in address[:8]}
    styles = "".join(re.sub(r"url\(.?data:[^)]*\)", "", path.read_text()) for path in site.rglob("*.css"))
    assert not outside
    assert not re.findall(r"(?:url\(|@import)[^;)]*//[^;)]*", styles)
