"""docs/dpo.md has a row for every loss, with its equation, its paper, when to use it, and what we measured."""

from __future__ import annotations

import re

import pytest

from diffusion_align.objectives import LIST_LOSSES, PREFERENCE_LOSSES, UNPAIRED_LOSSES
from tests.documents.pages import ROOT

PAGE = (ROOT / "docs" / "dpo.md").read_text()
TABLES = {"pairs": PREFERENCE_LOSSES, "lists": LIST_LOSSES, "labelled": UNPAIRED_LOSSES}


@pytest.mark.parametrize("kind", TABLES)
def test_every_loss_has_its_row(kind: str) -> None:
    table = PAGE.partition(f"<!-- losses: {kind} -->\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [re.split(r"(?<!\\)\|", row)[1:-1] for row in table]
    assert {row[0].strip(" `") for row in rows} == set(TABLES[kind])
    for name, equation, paper, use, ours in rows:
        assert equation.strip(), name
        assert use.strip(), name
        assert paper.strip() or "sft" in name
        assert re.fullmatch(r"-|\d+\.\d% \[.*\]", ours.strip()), name
