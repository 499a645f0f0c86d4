"""What is minimised: pure functions on tensors. No model, no file, no global state.

Names are imported when first used, so that settings can ask :mod:`.declared` without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import mse_per_sample
    from .pair_stats import LossOutput, PairStats
    from .preference import PREFERENCE_LOSSES, preference_loss

_HOMES = {
    "LossOutput": "pair_stats",
    "PREFERENCE_LOSSES": "preference",
    "PairStats": "pair_stats",
    "mse_per_sample": "errors",
    "preference_loss": "preference",
}

__all__ = ["PREFERENCE_LOSSES", "LossOutput", "PairStats", "mse_per_sample", "preference_loss"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
