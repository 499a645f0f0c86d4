"""A real headless browser, where there is one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

#: Debian's and others' names of it.
NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str:
    """The browser's program; without one tests are skipped, but not in CI."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium: apt-get install chromium (.ci/run does)")
        pytest.skip("NO BROWSER: the studio's pages are not tested here (apt-get install chromium)")
    return found


@contextmanager
def opened_browser() -> Iterator[Any]:
    """Playwright's browser."""
    from playwright.sync_api import sync_playwright

    program = executable()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
