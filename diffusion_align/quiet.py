"""What other libraries say that does not concern whoever runs a command; what does concern them is said once, by us,
and progress is told so that it can be read where it goes."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

#: Seconds between lines of progress where nobody looks at a bar.
EVERY = 30.0
#: Such a line, in tqdm's terms.
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"


@contextmanager
def unsaid(*loggers: str) -> Iterator[None]:
    """Inside, these loggers, by their full names, say nothing."""
    muted = [logger for name in loggers if not (logger := logging.getLogger(name)).disabled]
    for logger in muted:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in muted:
            logger.disabled = False


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Inside, diffusers and transformers show no bars: nested ones, of parts that load within a second."""
    from diffusers.utils import logging as diffusers_bars
    from transformers.utils import logging as transformers_bars

    shown = [bars for bars in (diffusers_bars, transformers_bars) if bars.is_progress_bar_enabled()]
    for bars in shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        for bars in shown:
            bars.enable_progress_bar()


@contextmanager
def no_table_bars() -> Iterator[None]:
    """Inside, datasets shows no bars: of files on this disk, which are read and written in no time."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


def progress_bar(iterable: Iterable[Any] | None = None, *, desc: str, **options: Any) -> Any:
    """tqdm's bar, on a terminal or in a notebook; elsewhere a line of text every ``EVERY`` seconds instead."""
    from tqdm.auto import tqdm

    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm(iterable, desc=desc, **options)

    class Lines(tqdm):
        said = time.monotonic()

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if msg is None and time.monotonic() - self.said >= EVERY:
                self.said = time.monotonic()
                self.fp.write(f"{self}\n")

        def clear(self, nolock: bool = False) -> None:
            """There is nothing to wipe away."""

    return Lines(iterable, desc=desc, bar_format=LINE, leave=False, **options)
