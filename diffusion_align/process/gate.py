"""Which path a diffusers scheduler belongs to: by its class, because configs of one are read by the other in silence.

``DDPMScheduler.from_config`` makes a variance-preserving table of a flow scheduler's config without a word.
"""

from __future__ import annotations

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
)

#: Schedulers of flow matching alone. Solvers of both have switches instead.
FLOW_SCHEDULERS: tuple[type[SchedulerMixin], ...] = (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
#: What the network of a flow model predicts, in the config of a solver of both.
FLOW_PREDICTION = "flow_prediction"


def grid_of(scheduler: Any) -> Any:
    """diffusers' scheduler, of one of our own (:class:`~.flow_sampler.FlowSampler`) the one whose grid it goes by."""
    return getattr(scheduler, "grid", scheduler)


def is_flow(scheduler: Any) -> bool:
    """Whether ``scheduler`` goes the straight way of flow matching: by its class, or as a solver with flow's sigmas."""
    own = grid_of(scheduler)
    both = bool(own.config.get("use_flow_sigmas")) and own.config.get("prediction_type") == FLOW_PREDICTION
    return isinstance(own, FLOW_SCHEDULERS) or both
