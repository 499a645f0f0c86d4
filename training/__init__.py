"""One training loop for every method; settings in ``config``, recipes in ``recipes/``."""

from .config import CONFIGS, DPOConfig, InPOConfig, TrainConfig

__all__ = ["CONFIGS", "DPOConfig", "InPOConfig", "TrainConfig"]
