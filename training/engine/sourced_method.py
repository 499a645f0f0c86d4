"""Methods whose batches come from one source, whose position is the method's whole state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)


class BatchSource(Protocol[B_co]):
    """Endless batches whose position can be saved."""

    def __iter__(self) -> Iterator[B_co]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SourcedMethod(Generic[B]):
    """What :class:`~.protocols.Method` asks for beside the loss."""

    source: BatchSource[B]

    def batches(self) -> Iterator[B]:
        return iter(self.source)

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)
