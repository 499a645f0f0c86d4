"""Scorers behind one protocol: as training signal, as guidance or as evaluation."""

from .base import RewardOutput, RewardScorer
from .factory import SCORERS, load_scorer
from .oracle import ScenesOracle

__all__ = ["SCORERS", "RewardOutput", "RewardScorer", "ScenesOracle", "load_scorer"]
