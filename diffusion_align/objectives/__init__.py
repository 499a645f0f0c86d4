"""What is minimised: pure functions on tensors. No model, no file, no global state."""

from .errors import mse_per_sample
from .pair_stats import LossOutput, PairStats
from .preference import PREFERENCE_LOSSES, preference_loss

__all__ = ["PREFERENCE_LOSSES", "LossOutput", "PairStats", "mse_per_sample", "preference_loss"]
