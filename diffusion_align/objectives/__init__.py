"""What is minimised: pure functions on tensors. No model, no file, no global state.

Names are imported when first used, so that settings can ask :mod:`.declared` without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import mse_per_sample
    from .list_stats import ListStats, Targets
    from .one_signature import LIST_LOSSES, UNPAIRED_LOSSES, alignment_loss
    from .pair_stats import LossOutput, PairStats
    from .preference import PREFERENCE_LOSSES, preference_loss

_HOMES = {
    "LIST_LOSSES": "one_signature",
    "ListStats": "list_stats",
    "LossOutput": "pair_stats",
    "PREFERENCE_LOSSES": "preference",
    "PairStats": "pair_stats",
    "Targets": "list_stats",
    "UNPAIRED_LOSSES": "one_signature",
    "mse_per_sample": "errors",
    "alignment_loss": "one_signature",
    "preference_loss": "preference",
}

__all__ = [
    "LIST_LOSSES", "PREFERENCE_LOSSES", "UNPAIRED_LOSSES", "ListStats", "LossOutput", "PairStats", "Targets",
    "alignment_loss", "mse_per_sample", "preference_loss",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
