"""Samplers by the names that commands give them, for models with timesteps and for those of flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import diffusers

from diffusion_align.adapters import Adapter

#: diffusers' class and what its config changes, by the names of ``--scheduler``.
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "ddim": ("DDIMScheduler", {}),
        "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
        "euler": ("EulerDiscreteScheduler", {}),
        "euler-a": ("EulerAncestralDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
        "dpm++": ("DPMSolverMultistepScheduler", {}),
        "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
        "unipc": ("UniPCMultistepScheduler", {}),
        "lcm": ("LCMScheduler", {}),
        "tcd": ("TCDScheduler", {}),
    }
)
#: What solvers of both processes need for the straight path.
STRAIGHT: Mapping[str, Any] = MappingProxyType({"use_flow_sigmas": True, "prediction_type": "flow_prediction"})
#: The same for flow models.
FLOW_SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "heun": ("FlowMatchHeunDiscreteScheduler", {}),
        "dpm++": ("DPMSolverMultistepScheduler", STRAIGHT),
        "dpm++-sde": ("DPMSolverMultistepScheduler", {**STRAIGHT, "algorithm_type": "sde-dpmsolver++"}),
        "unipc": ("UniPCMultistepScheduler", STRAIGHT),
        "lcm": ("FlowMatchLCMScheduler", {}),
    }
)


def named_scheduler(adapter: Adapter, name: str) -> Any:
    """The scheduler that is called ``name``, with the model's own schedule; None for "default", the pipeline's own.

    Raises:
        ValueError: there is none of this name for such a model, or it has not the model's kind of shift.
    """
    if name == "default":
        return None
    own = adapter.pipeline.scheduler.config
    if not adapter.path.straight:
        kind, changes = SCHEDULERS[name]
        return getattr(diffusers, kind).from_config(own, **changes)
    if name not in FLOW_SCHEDULERS:
        raise ValueError(
            f"scheduler {name} is for models with timesteps, this one is of flow matching: expected default or one of "
            f"{', '.join(FLOW_SCHEDULERS)}"
        )
    kind, changes = FLOW_SCHEDULERS[name]
    found: Any = getattr(diffusers, kind)
    if own.get("use_dynamic_shifting") and name == "heun":
        raise ValueError("scheduler heun has no dynamic shift, which this model needs: take euler or dpm++")
    shift = own.get("flow_shift" if own.get("use_flow_sigmas") else "shift", 1.0)
    renamed = {"flow_shift": shift} if "use_flow_sigmas" in changes else {"shift": shift}
    # Solvers of both processes have no "shift", and would say so.
    kept = {key: value for key, value in own.items() if key != "shift"}
    return found.from_config(kept, **changes, **renamed)
