"""Scorers behind one protocol: as training signal, as guidance or as evaluation.

Names are imported when first used: the list of scorers (``catalogue``) must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .combine import Cached, Calibrated, Ensemble, Weighted
    from .factory import SCORERS, known_scorers, load_scorer
    from .preprocess import Preprocess
    from .protocol import Images, RewardOutput, RewardScorer, score_in_batches
    from .trained.scorer import TrainedScorer

_HOMES = {
    "SCORERS": ".factory",
    "Cached": ".combine",
    "Calibrated": ".combine",
    "Ensemble": ".combine",
    "Images": ".protocol",
    "Preprocess": ".preprocess",
    "RewardOutput": ".protocol",
    "RewardScorer": ".protocol",
    "ScenesOracle": "diffusion_align.scenes.oracle_scorer",  # lives in a room above
    "TrainedScorer": ".trained.scorer",
    "Weighted": ".combine",
    "known_scorers": ".factory",
    "load_scorer": ".factory",
    "score_in_batches": ".protocol",
}

__all__ = [
    "SCORERS",
    "Cached",
    "Calibrated",
    "Ensemble",
    "Images",
    "Preprocess",
    "RewardOutput",
    "RewardScorer",
    "ScenesOracle",
    "TrainedScorer",
    "Weighted",
    "known_scorers",
    "load_scorer",
    "score_in_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
