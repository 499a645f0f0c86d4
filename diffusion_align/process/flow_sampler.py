"""A scheduler on a flow scheduler's own grid whose steps may draw fresh noise: what online methods draw with."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from diffusion_align.devices import send

from .calls import set_steps
from .levels import StraightLevel
from .path import Path
from .step_kinds import NoiseKind


class FlowSampler:
    """Steps are ``Path.gaussian``'s, from one level of the grid to the next; with ``eta`` 0 they are Euler's.

    It has what the sampler asks of a diffusers scheduler.

    Args:
        scheduler: whose grid it takes, e.g. ``FlowMatchEulerDiscreteScheduler``; a copy is used.
        path: the model's.
        kind: how noise comes in.

    Attributes:
        sigmas: (N + 1,) float32, after ``set_timesteps``.
        timesteps: (N,) float32.
    """

    order = 1

    def __init__(self, scheduler: Any, path: Path, kind: NoiseKind = "ddim") -> None:
        self.grid, self.path, self.kind = copy.deepcopy(scheduler), path, kind
        self.config = self.grid.config
        self.step_index = 0

    @property
    def sigmas(self) -> Tensor:
        found: Tensor = self.grid.sigmas
        return found

    @property
    def timesteps(self) -> Tensor:
        found: Tensor = self.grid.timesteps
        return found

    @property
    def num_inference_steps(self) -> int:
        """N."""
        return len(self.timesteps)

    def set_timesteps(self, num_inference_steps: int, **options: Any) -> None:
        """As the grid's scheduler: ``options`` are its own (mu, sigmas).

        Raises:
            ValueError: it cannot make so few or so many, or calls the network more than once a step.
        """
        set_steps(self.grid, num_inference_steps, **options)
        if self.grid.order != 1:
            raise ValueError(f"scheduler: {type(self.grid).__name__} has no steps that draw noise: take Euler's")
        self.step_index = 0

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The next latents (B, C, h, w), like the output: a draw of the step's Gaussian.

        Args:
            eta: noise level of the kind.
            variance_noise: (B, C, h, w) standard normal, needed where ``eta`` > 0.
        """
        ends = send(self.sigmas[self.step_index : self.step_index + 2].float(), sample.device)
        now, after = (StraightLevel.from_sigma(sigma.view(1, 1, 1, 1)) for sigma in ends)
        self.step_index += 1
        x = sample.float()
        if not eta:
            return ((x + (after.sigma - now.sigma) * model_output).to(model_output.dtype),)
        x0, _ = self.path.split(x, model_output.float(), now)
        drawn = self.path.gaussian(x, x0, now, after, eta, self.kind)
        if variance_noise is None:
            raise ValueError(f"eta = {eta:g} needs variance_noise like the latents")
        return ((drawn.mean + drawn.std * variance_noise).to(model_output.dtype),)
