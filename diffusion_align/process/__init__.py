"""The noising process and its algebra: schedule, predictions, steps, inversion, noise levels. No model, no I/O."""

from .inversion import ddim_invert, inverted_noise
from .levels import log_snr, signal_levels
from .path import NoiseSchedule
from .prediction import Prediction, PredictionType
from .steps import GaussianStep, average, ddim_step, sensitivity

__all__ = [
    "GaussianStep",
    "NoiseSchedule",
    "Prediction",
    "PredictionType",
    "average",
    "ddim_invert",
    "ddim_step",
    "inverted_noise",
    "log_snr",
    "sensitivity",
    "signal_levels",
]
