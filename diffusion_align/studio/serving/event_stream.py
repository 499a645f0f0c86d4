"""Server-sent events: one stream a tab, numbered, resumed by the last number that was seen."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

#: Seconds after which a comment is sent, so that proxies keep the stream.
HEARTBEAT = 15.0
#: Events that are remembered for tabs that come back.
REMEMBERED = 1000


@dataclass
class EventStream:
    """What happened, for all tabs. ``send`` may be called by any thread."""

    heartbeat: float = HEARTBEAT
    _events: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _last: int = 0
    _loop: asyncio.AbstractEventLoop | None = None
    _closed: bool = False
    _waiting: set[asyncio.Event] = field(default_factory=set)

    @property
    def heard(self) -> bool:
        """Whether any tab listens."""
        return bool(self._waiting)

    def send(self, kind: str, **facts: Any) -> None:
        """Tell all tabs."""
        self._last += 1
        self._events.append((self._last, json.dumps({"kind": kind, **facts})))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        """End all streams; called in the server's own thread."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for event in self._waiting:
            event.set()

    async def follow(self, last: int | None) -> AsyncIterator[bytes]:
        """Everything after event ``last`` (None: from now on), as it is sent."""
        self._loop = asyncio.get_running_loop()
        seen = self._last if last is None or last > self._last else last
        news = asyncio.Event()
        self._waiting.add(news)
        try:
            yield b"retry: 1000\n\n"
            while not self._closed:
                for number, text in [event for event in self._events if event[0] > seen]:
                    yield f"id: {number}\ndata: {text}\n\n".encode()
                    seen = number
                news.clear()
                if self._last > seen or self._closed:
                    continue
                try:
                    await asyncio.wait_for(news.wait(), self.heartbeat)
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            self._waiting.discard(news)
