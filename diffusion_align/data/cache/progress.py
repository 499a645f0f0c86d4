"""How far a long work is, how fast it goes and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Steps that are not counted, because the first ones are slow, and steps after which the end is foretold.
WARM_UP, FORETOLD = 1, 3


class Progress:
    """Counts what is done, and tells it.

    Args:
        total: how many there are.
        unit: what they are called.
        say: takes the texts.
        clock: seconds.
    """

    def __init__(
        self, total: int, unit: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.unit, self._say, self._clock = total, unit, say, clock
        self.done, self._steps, self._began, self._counted = 0, 0, clock(), 0

    def add(self, count: int) -> None:
        """``count`` more are done; after the first of them it is foretold how long all will take."""
        self.done += count
        self._steps += 1
        if self._steps == WARM_UP:
            self._began, self._counted = self._clock(), self.done
        if self._steps == FORETOLD and self.done < self.total:
            self._say(f"about {duration(self._left())} for {self.total - self.done:,} more {self.unit}, by the first")

    def skip(self, count: int) -> None:
        """``count`` of them were done before."""
        self.total -= count

    def tell(self, text: str) -> None:
        """``text``, with how far and how fast the work is."""
        rate = self._rate()
        speed = "" if rate is None else f", {rate:.3g} a second, {duration(self._left())} left"
        self._say(f"{text} ({self.done:,} of {self.total:,} {self.unit}{speed})")

    def _rate(self) -> float | None:
        seconds = self._clock() - self._began
        counted = self.done - self._counted
        return counted / seconds if counted and seconds > 0 else None

    def _left(self) -> float:
        return (self.total - self.done) / (self._rate() or 1.0)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as one says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as one says them."""
    power = 30 if count >= 2**30 else 20 if count >= 2**20 else 10
    return f"{count / 2**power:,.1f} {('KiB', 'MiB', 'GiB')[power // 10 - 1]}"
