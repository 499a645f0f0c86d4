"""One training loop for every method; a room per kind of method; recipes in ``recipes/``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .methods import METHODS, config_class
from .pairs.config import DPOConfig, InPOConfig
from .policy.config import TrainConfig

if TYPE_CHECKING:
    from .engine.config import RunConfig

    CONFIGS: dict[str, type[RunConfig]]

__all__ = ["CONFIGS", "METHODS", "DPOConfig", "InPOConfig", "TrainConfig", "config_class"]


def __getattr__(name: str) -> Any:
    if name == "CONFIGS":  # the table as it was in 0.1: every class at once
        return {method: config_class(method) for method in METHODS}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
