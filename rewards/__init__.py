"""Scorers behind one protocol: as training signal, as guidance or as evaluation."""

from .base import Images, RewardOutput, RewardScorer, score_in_batches
from .combine import Cached, Calibrated, Ensemble, Weighted
from .factory import SCORERS, known_scorers, load_scorer
from .oracle import ScenesOracle
from .preprocess import Preprocess
from .trained import TrainedScorer

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
