"""What the loop needs from what it trains and from methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from diffusion_align.evaluation.report import Report

from .metrics import Metrics
from .watching.watchdog import Watchdog

#: Called with the step as (step), by all processes together; returns metrics such as {"eval/win_rate": 0.6}, to all.
Validate = Callable[[int], dict[str, float]]
#: Adds to a report what a method has to show; the lines are those of metrics.jsonl.
AddToReport = Callable[[Report, Sequence[Mapping[str, Any]]], object]


class RunInterrupted(RuntimeError):
    """A method cannot continue, for a reason outside the loop: the loop writes a checkpoint and stops with this error.

    Who raises it in ``batches`` or ``loss`` first puts its state back to where the last optimiser step left it, so that
    the resumed run continues as if nothing had happened.
    """


class Trainable(Protocol):
    """What is trained."""

    @property
    def network(self) -> nn.Module:
        """Switched between train and eval mode."""

    @property
    def shardable(self) -> Sequence[nn.Module]:
        """``network`` and frozen copies beside it, each of which may be cut over processes; none where what is trained
        is small and held whole."""

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """By name, in a fixed order."""

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """Replace the module that forward passes call by ``wrapper`` of it, and return it."""

    def save(self, folder: Path) -> Path:
        """Write the trained weights; returns what to load."""


class Method(Protocol):
    """What a training method must offer to the loop."""

    def batches(self) -> Iterator[Any]:
        """Endless training batches of this process."""

    def loss(self, batch: Any) -> tuple[Tensor, Metrics]:
        """Scalar loss with a graph, and metrics that stay on the device."""

    def state_dict(self) -> dict[str, Any]:
        """Position of the method (data, schedules): JSON-able values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo ``state_dict``; called before ``batches``."""


@dataclass(frozen=True)
class Job:
    """A run made ready.

    Attributes:
        trained: what is trained.
        method: how.
        validate: how it is validated, by all processes together; None: not at all.
        report: adds to the run's report what only this method has; None: nothing.
        watchdog: reads its metrics, raises alarms, and may stop it; None: nobody does.
    """

    trained: Trainable
    method: Method
    validate: Validate | None = None
    report: AddToReport | None = None
    watchdog: Watchdog | None = None
