"""Progress on stderr: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any

from diffusion_align.quiet import EVERY


def note(text: str) -> None:
    """Progress, a note or a warning for the user, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """How far a long task is.

    On a terminal it is one bar, redrawn (NO_COLOR leaves its colours out); elsewhere a line of text at the first call,
    then at most every ``every`` seconds.

    Args:
        title: what is done.
        every: seconds between lines.
        stream: where to; unset: stderr.
        clock: seconds.
    """

    def __init__(
        self,
        title: str,
        every: float = EVERY,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.every, self.clock = title, every, clock
        self.stream = stream or sys.stderr
        self.last: float | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bars(*columns, console=Console(file=self.stream), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=None)
        return self

    def __call__(self, text: str, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` are done of what ``text`` names."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self.title}: {text}", completed=done, total=total)
            return
        now = self.clock()
        if self.last is None or now - self.last >= self.every:
            self.last = now
            print(f"{self.title}: {text}, {done} of {total}", file=self.stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
