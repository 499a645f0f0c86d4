"""Where a scheduler's steps lie on the noise axis, whatever the scheduler's own parametrisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def signal_levels(scheduler: Any) -> Tensor:
    """alpha_bar at each of the N steps and after the last one, (N + 1,) float32 on the CPU.

    Call after ``scheduler.set_timesteps``. Schedulers with sigmas (Euler, DPM++, UniPC) have alpha_bar =
    1 / (1 + sigma^2) in their variance-preserving view; DDPM-like ones a table by timestep, and end where their config
    says (``set_alpha_to_one``).
    """
    timesteps = scheduler.timesteps
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        levels: Tensor = 1 / (1 + sigmas.detach().cpu().double() ** 2)
        return levels.float()
    table = scheduler.alphas_cumprod.cpu()
    last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
    return torch.cat([table[timesteps.cpu().long()], last.detach().cpu().view(1)]).float()


def log_snr(alpha_bar: Tensor) -> Tensor:
    """log(alpha_bar / (1 - alpha_bar)), kept finite for a clean image; same shape, float32."""
    level = alpha_bar.float().clamp(1e-5, 1 - 1e-5)
    return level.log() - (1 - level).log()
