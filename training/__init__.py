"""One training loop for every method; settings in ``config``, recipes in ``recipes/``."""

from .config import DPOConfig, InPOConfig, TrainConfig
from .methods import CONFIGS

__all__ = ["CONFIGS", "DPOConfig", "InPOConfig", "TrainConfig"]
