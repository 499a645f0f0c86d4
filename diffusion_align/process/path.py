"""The training noise schedule of variance-preserving models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """``alpha_bar`` (T,) float32: the cumulative signal power of the forward process."""

    table: Tensor

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """Read the training schedule out of any diffusers scheduler's config (its sampler plays no part)."""
        return cls(DDPMScheduler.from_config(scheduler.config).alphas_cumprod.float())

    @property
    def num_timesteps(self) -> int:
        return len(self.table)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """alpha_bar_t as (B, 1, 1, 1) on the device of ``t`` (B,), an integer tensor in [0, T)."""
        return self.table.to(t.device)[t.long()].view(-1, 1, 1, 1)

    def alpha(self, t: Tensor) -> Tensor:
        """sqrt(alpha_bar_t), (B, 1, 1, 1)."""
        return self.alpha_bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha_bar_t), (B, 1, 1, 1)."""
        return (1 - self.alpha_bar(t)).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """alpha_bar_t / (1 - alpha_bar_t), (B, 1, 1, 1)."""
        return self.alpha_bar(t) / (1 - self.alpha_bar(t))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, in float32, returned in the dtype of ``x0``."""
        x_t = self.alpha(t) * x0.float() + self.sigma(t) * eps.float()
        return x_t.to(x0.dtype)
