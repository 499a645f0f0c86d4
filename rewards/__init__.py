"""Scorers behind one protocol: as training signal, as guidance or as evaluation."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .combine import Cached, Calibrated, Ensemble, Weighted
from .factory import SCORERS, known_scorers, load_scorer
from .preprocess import Preprocess
from .protocol import Images, RewardOutput, RewardScorer, score_in_batches
from .trained.scorer import TrainedScorer

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
    if name != "ScenesOracle":  # lives in a room above
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("diffusion_align.scenes.oracle_scorer").ScenesOracle
