"""One browser for a worker's tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest

from tests.studio.browser import opened_browser

#: What drawing processes import: once for all those of a worker's tests.
DRAWING = ("adapters", "commands.evaluating.picture_drawing", "commands.generate", "rewards", "sampling.sampler")
multiprocessing.set_forkserver_preload(
    [
        *(f"diffusion_align.{name}" for name in DRAWING),
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    ]
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with opened_browser() as found:
        yield found
