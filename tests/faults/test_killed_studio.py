"""The studio's whole server killed fifty times while somebody labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.studio.killing import label_through_kills

pytestmark = pytest.mark.faults


def test_no_acknowledged_verdict_is_lost_or_doubled_by_50_kills_of_the_server(tmp_path: Path) -> None:
    label_through_kills(tmp_path, 50)
