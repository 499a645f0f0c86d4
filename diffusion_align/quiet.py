"""What other libraries say that does not concern whoever runs a command; what does concern them is said once, by us."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
