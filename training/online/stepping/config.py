"""Settings of sampling steps with fresh noise, which policy gradient trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusion_align.training.engine.config import Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class Stepping:
    """Where fresh noise comes in, how much of it, and which steps are trained on."""

    eta: PositiveFloat = 1.0
    """DDIM's share of fresh noise; 1 is DDPM. For noise_kind ddim."""
    noise_kind: Literal["ddim", "cps", "precise", "flow-sde", "dance"] = "ddim"
    """Flow models: how fresh noise comes in. ddim, cps and precise keep the noise that belongs to each level; flow-sde
    (Flow-GRPO) and dance (DanceGRPO) leave more, so that steps with too much of it draw none. Others: ddim."""
    noise_level: PositiveFloat | None = None
    """Noise level of the other kinds; published: cps 0.8, flow-sde 0.7, dance 0.3. It carries over neither between
    models nor between numbers of steps."""
    train_steps: Positive | Literal["all"] = 4
    """Sampling steps of each picture that are trained on (random ones, or those of the window); all: those that have
    noise (DDPO's timestep_fraction 1)."""
    stochastic_steps: Literal["all", "window"] = "all"
    """Fresh noise in every step, or only in a random window of train_steps steps (MixGRPO 2507.21802)."""
    step_normalisation: bool = True
    """Divide log-ratios by how far each step's can move, so that all steps count alike (GRPO-Guard 2510.22319)."""
    shared_noise: bool = True
    """All pictures of a prompt start from the same noise, so they differ by the policy's own steps alone."""
    fused_rollouts: bool = False
    """Update on the sampler's own forward pass instead of a second one: the same gradients, faster, more memory."""
    trajectory_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """How latents are stored between sampling and training; the sampler continues from what was stored."""

    @property
    def level(self) -> float:
        """The noise level of ``noise_kind``."""
        return self.eta if self.noise_level is None else self.noise_level

    def check_noise(self) -> None:
        """Raises ValueError where the kind of noise and its level do not fit each other."""
        if self.noise_kind == "ddim" and self.noise_level is not None:
            raise ValueError(f"noise_level = {self.noise_level:g} is not for noise_kind ddim: set eta instead")
        if self.noise_kind != "ddim" and self.noise_level is None:
            raise ValueError(f"noise_kind {self.noise_kind} needs noise_level, e.g. cps 0.8, flow-sde 0.7, dance 0.3")
        if self.noise_kind != "ddim" and self.eta != Stepping.eta:
            raise ValueError(f"eta = {self.eta:g} is for noise_kind ddim: {self.noise_kind} has noise_level")
