"""Fresh noise in a scheduler's steps, drawn for each picture from its own seed."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusion_align.devices import send


@dataclass(frozen=True)
class StepNoise:
    """What a scheduler's ``step`` takes besides prediction, time and latents.

    Attributes:
        accepted: names of its parameters; schedulers differ, and a deterministic one has neither eta nor generator.
        generators: B, one per picture.
    """

    accepted: Collection[str]
    generators: list[torch.Generator]

    @classmethod
    def of(cls, scheduler: Any, generators: list[torch.Generator]) -> StepNoise:
        """For ``scheduler``, which is changed where it seeds its own noise (DPM++ SDE's Brownian paths).

        Each picture gets a path of its own, from its seed or from the ``noise_sampler_seed`` in the config: the one
        that the pipeline draws the picture with when it draws it alone.
        """
        if hasattr(scheduler, "noise_sampler_seed"):
            given = scheduler.config.noise_sampler_seed
            seeds = [generator.initial_seed() if given is None else given for generator in generators]
            scheduler.noise_sampler_seed = seeds
        return cls(inspect.signature(scheduler.step).parameters, generators)

    def arguments(self, eta: float, output: Tensor) -> dict[str, Any]:
        """Keyword arguments of the step after the prediction ``output`` (B, C, h, w)."""
        found: dict[str, Any] = {"eta": eta} if "eta" in self.accepted else {}
        if "eta" in self.accepted and "variance_noise" in self.accepted:
            # Drawn as DDIM would, which would wait for its copy to the device.
            fresh = randn_tensor(output.shape, self.generators) if eta else None
            return {**found, "variance_noise": None if fresh is None else send(fresh, output.device)}
        return {**found, "generator": self.generators} if "generator" in self.accepted else found
