"""The noising process: every formula that relates clean latents, noise, noisy latents, time and network output.

No model and no I/O lives here; models and samplers ask a path (:mod:`.path`) and its levels (:mod:`.levels`).
"""

from .calls import Call, call_level, model_calls, set_steps
from .inversion import ddim_invert, invert
from .levels import Level, log_snr
from .outputs import OUTPUTS, Output, Prediction, PredictionType
from .path import Path, VariancePreserving
from .steps import GaussianStep, average

__all__ = [
    "OUTPUTS",
    "Call",
    "GaussianStep",
    "Level",
    "Output",
    "Path",
    "Prediction",
    "PredictionType",
    "VariancePreserving",
    "average",
    "call_level",
    "ddim_invert",
    "invert",
    "log_snr",
    "model_calls",
    "set_steps",
]
