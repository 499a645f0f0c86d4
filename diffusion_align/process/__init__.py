"""The noising process: every formula that relates clean latents, noise, noisy latents, time and network output.

No model and no I/O lives here; models and samplers ask a path (:mod:`.path`) and its levels (:mod:`.levels`).
"""

from .calls import Call, call_level, model_calls, model_input, set_steps, start_scale
from .flow import FlowMatching, Shift, TimeDensity, path_of
from .flow_sampler import FlowSampler
from .gate import is_flow
from .inversion import ddim_invert, invert
from .levels import Level, StraightLevel, log_snr
from .outputs import FLOW, OUTPUTS, Output, Prediction, PredictionType
from .path import Path, VariancePreserving
from .step_kinds import KINDS, NoiseKind
from .steps import GaussianStep, average

__all__ = [
    "FLOW",
    "KINDS",
    "OUTPUTS",
    "Call",
    "FlowMatching",
    "FlowSampler",
    "GaussianStep",
    "Level",
    "NoiseKind",
    "Output",
    "Path",
    "Prediction",
    "PredictionType",
    "Shift",
    "StraightLevel",
    "TimeDensity",
    "VariancePreserving",
    "average",
    "call_level",
    "ddim_invert",
    "invert",
    "is_flow",
    "log_snr",
    "model_calls",
    "model_input",
    "path_of",
    "set_steps",
    "start_scale",
]
