"""Where results go: text on stdout, or with --json one JSON object there and nothing else; with --quiet nothing else is
said at all."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


class Nowhere(io.TextIOBase):
    """Takes text and forgets it. It is never closed: libraries keep the stderr that they first saw."""

    def write(self, text: str) -> int:
        return len(text)


@dataclass
class Talk:
    """What a command has said that --json prints at its end.

    Attributes:
        said: its values; a list only of those that ever printed one.
        printed: what was printed all the same.
    """

    said: dict[str, Any] | list[Any] = field(default_factory=dict)
    printed: io.StringIO = field(default_factory=io.StringIO)

    def text(self, status: int) -> str:
        """The object: what was said, else what was printed if that is JSON, else the exit status."""
        if self.said:
            return json.dumps(self.said, indent=2)
        printed = self.printed.getvalue()
        try:
            json.loads(printed)
        except ValueError:
            sys.stderr.write(printed)
            return json.dumps({"status": status})
        return printed.strip()


_TALK: ContextVar[Talk | None] = ContextVar("talk", default=None)
_NOWHERE = Nowhere()


@contextmanager
def talking(as_json: bool, quiet: bool) -> Iterator[Talk | None]:
    """Inside, a command runs; gives what it has said, or None where it says it at once."""
    talk = Talk() if as_json else None
    with ExitStack() as stack:
        if quiet:
            stack.enter_context(redirect_stderr(_NOWHERE))
        if talk is not None:
            stack.enter_context(redirect_stdout(talk.printed))
        token = _TALK.set(talk)
        try:
            yield talk
        finally:
            _TALK.reset(token)


def conclude(text: object, values: Mapping[str, Any] | list[Any]) -> None:
    """A result: ``text`` on stdout, or with --json ``values`` among those that are printed at the end."""
    talk = _TALK.get()
    if talk is None:
        print(text, flush=True)
    elif isinstance(values, list):
        talk.said = values
    elif isinstance(talk.said, dict):
        talk.said.update(values)
