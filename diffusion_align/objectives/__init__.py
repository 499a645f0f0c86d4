"""What is minimised: pure functions on tensors. No model, no file, no global state."""

from .errors import min_snr_weight, mse_per_sample
from .preference import PREFERENCE_LOSSES, preference_loss
from .stats import LossOutput, PairStats

__all__ = ["PREFERENCE_LOSSES", "LossOutput", "PairStats", "min_snr_weight", "mse_per_sample", "preference_loss"]
