"""One browser for a worker's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.studio.browser import opened_browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with opened_browser() as found:
        yield found
