"""One training loop for every method; a room per kind of method; recipes in ``recipes/``."""

from .methods import METHODS, config_class
from .pairs.config import DPOConfig, InPOConfig
from .policy.config import TrainConfig

__all__ = ["METHODS", "DPOConfig", "InPOConfig", "TrainConfig", "config_class"]
