"""Which preference losses there are: tables by name, which decorators fill.

The settings' choices (:mod:`..declared`), the table in docs/dpo.md and the tests follow from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss on pairs and what it understands.

    Attributes:
        function: (stats, beta, **options) to the loss of each pair, (B,) float32; ``beta`` may be (B,).
        label_smoothing, soft_labels, target, eta: whether it takes the option of that name.
        needs_reference: whether it reads the reference's errors.
        shift: whether rewards are compared with their mean, which is better known over many batches than in one.
        compares: whether it looks at both pictures of a pair.
        across_batch: whether a pair's loss depends on where it stands among the other pairs of the batch.
    """

    function: Callable[..., Tensor]
    label_smoothing: bool = False
    soft_labels: bool = False
    target: bool = False
    eta: bool = False
    needs_reference: bool = True
    shift: bool = False
    compares: bool = True
    across_batch: bool = False


@dataclass(frozen=True)
class ListLoss:
    """A loss on lists and what it reads.

    Attributes:
        function: (stats, targets, beta, **options) to the loss of each list, (B,) float32.
        advantage: what ``targets.advantage`` is where the settings do not say; None: it reads ranks only.
        options: names of its own options.
    """

    function: Callable[..., Tensor]
    advantage: Literal["win_rate", "standardised"] | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnpairedLoss:
    """A loss on single pictures with a label.

    Attributes:
        function: (stats, targets, beta, shift, **options) to the loss of each picture, (B,) float32.
        balanced: whether ``shift`` is the mean of the two labels' mean rewards instead of the mean of all.
    """

    function: Callable[..., Tensor]
    balanced: bool = False


#: By name; filled by the decorators below.
PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}
LIST_LOSSES: dict[str, ListLoss] = {}
UNPAIRED_LOSSES: dict[str, UnpairedLoss] = {}


def pair_loss(**facts: bool) -> Callable[[F], F]:
    """Register a function as the ``loss_type`` of its name; the settings' choices and the tests follow.

    Args:
        facts: fields of :class:`PreferenceLoss`.
    """

    def register(function: F) -> F:
        PREFERENCE_LOSSES[function.__name__] = PreferenceLoss(function, **facts)
        return function

    return register


def list_loss(**facts: Any) -> Callable[[F], F]:
    """Register a loss on lists; ``facts`` are fields of :class:`ListLoss`."""

    def register(function: F) -> F:
        LIST_LOSSES[function.__name__] = ListLoss(function, **facts)
        return function

    return register


def unpaired_loss(**facts: bool) -> Callable[[F], F]:
    """Register a loss on labelled pictures; ``facts`` are fields of :class:`UnpairedLoss`."""

    def register(function: F) -> F:
        UNPAIRED_LOSSES[function.__name__] = UnpairedLoss(function, **facts)
        return function

    return register
