"""One training loop for every method; a room per kind of method; recipes in ``recipes/``."""

from .methods import CONFIGS
from .pairs.config import DPOConfig, InPOConfig
from .policy.config import TrainConfig

__all__ = ["CONFIGS", "DPOConfig", "InPOConfig", "TrainConfig"]
