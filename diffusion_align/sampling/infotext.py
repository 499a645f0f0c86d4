"""How a picture was made, as A1111 writes it into PNGs ("parameters"): Forge and picture browsers read it, too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

#: A1111's names of samplers, by diffusers' class.
SAMPLERS: Mapping[str, str] = MappingProxyType(
    {
        "DDIMScheduler": "DDIM",
        "PNDMScheduler": "PLMS",
        "EulerDiscreteScheduler": "Euler",
        "EulerAncestralDiscreteScheduler": "Euler a",
        "HeunDiscreteScheduler": "Heun",
        "UniPCMultistepScheduler": "UniPC",
        "LCMScheduler": "LCM",
        "TCDScheduler": "TCD",
        "FlowMatchEulerDiscreteScheduler": "Euler",
        "FlowMatchHeunDiscreteScheduler": "Heun",
        "FlowMatchLCMScheduler": "LCM",
    }
)
#: Its names of noise schedules, by the switch in diffusers' config.
SCHEDULES: Mapping[str, str] = MappingProxyType(
    {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "Exponential", "use_beta_sigmas": "Beta"}
)


@dataclass(frozen=True)
class SamplerTold:
    """A sampler as A1111 calls it.

    Attributes:
        schedule: "Karras" and so on; "" for the sampler's usual one.
    """

    name: str
    schedule: str = ""

    @classmethod
    def of(cls, scheduler: Any) -> SamplerTold:
        """Of a scheduler of diffusers; one that A1111 has no name for keeps diffusers' own."""
        config, kind = scheduler.config, type(scheduler).__name__
        schedule = next((name for switch, name in SCHEDULES.items() if config.get(switch)), "")
        if kind == "DPMSolverMultistepScheduler" and config.algorithm_type.endswith("++"):
            sde = " SDE" if config.algorithm_type.startswith("sde") else ""
            return cls(f"DPM++ {config.solver_order}M{sde}", schedule)
        return cls(SAMPLERS.get(kind, kind.removesuffix("Scheduler")), schedule)


@dataclass(frozen=True, kw_only=True)
class Infotext:
    """What A1111 tells of a picture.

    Attributes:
        negative_prompt: "" for none.
        size: (w, h) in pixels.
        loras: A1111's hash of each LoRA, by its name. The prompt has no ``<lora:NAME:WEIGHT>``: it stays as it was
            given.
    """

    prompt: str
    negative_prompt: str
    steps: int
    sampler: SamplerTold
    scale: float
    seed: int
    size: tuple[int, int]
    model: str
    loras: Mapping[str, str]

    def text(self) -> str:
        """The prompt, the negative one, and a line of ``Name: value`` parted by commas."""
        hashes = ", ".join(f"{name.replace(':', '').replace(',', '')}: {told}" for name, told in self.loras.items())
        told = {
            "Steps": str(self.steps),
            "Sampler": self.sampler.name,
            "Schedule type": self.sampler.schedule,
            "CFG scale": f"{self.scale:g}",
            "Seed": str(self.seed),
            "Size": f"{self.size[0]}x{self.size[1]}",
            "Model": self.model,
            "Lora hashes": hashes,
        }
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        settings = ", ".join(f"{name}: {quoted(value)}" for name, value in told.items() if value)
        return "\n".join([self.prompt, *negative, settings])


def quoted(value: str) -> str:
    """``value`` as it may stand between commas."""
    return json.dumps(value, ensure_ascii=False) if any(sign in value for sign in ',\n:"') else value
