"""The path from images to noise that a model was trained on, and everything that follows from it.

A path is stateless. Other rooms ask it; none of them writes a square root of alpha_bar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from .calls import model_calls
from .levels import Level
from .outputs import OUTPUTS, Output, Prediction
from .steps import GaussianStep


def scaled_linear(steps: int = 1000) -> Tensor:
    """Stable Diffusion's alpha_bar (steps,) float64, whose betas grow with the square of a line."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


class Path(Protocol):
    """What models, samplers and methods ask. Times ``t`` (B,) are in the path's own unit."""

    @property
    def output(self) -> Output:
        """What the network predicts."""

    @property
    def num_timesteps(self) -> int:
        """How many training times there are."""

    def at(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Level[Tensor]:
        """Levels (B, 1, 1, 1) at times ``t`` (B,), on their device, computed in ``dtype``."""

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps, (B, C, h, w), in the dtype of ``x0``."""

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network's raw output should be at ``noise(x0, eps, t)``, (B, C, h, w)."""

    def views(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """A raw output (B, C, h, w) for ``x_t`` as x0, eps and v."""

    def draw_times(self, generators: Sequence[torch.Generator], low: int, high: int) -> Tensor:
        """Training times (B,), uniform in [low, high), one from each CPU generator."""

    def levels(self, scheduler: Any, steps: int | None = None) -> Level[Tensor]:
        """Levels (N + 1,) at the start of a scheduler's N steps and after the last, float32 on the CPU."""

    def variance(self, now: Level[Tensor], after: Level[Tensor], eta: float) -> Tensor:
        """Variance of the fresh noise in a step from ``now`` to ``after``, like their tensors."""

    def gaussian(self, x: Tensor, x0: Tensor, now: Level[Tensor], after: Level[Tensor], eta: float) -> GaussianStep:
        """The step from ``x`` (B, C, h, w) with predicted clean latents ``x0``."""

    def sensitivity(self, now: Level[Tensor], after: Level[Tensor], eta: float) -> Tensor:
        """(d mean / d eps)^2 / (2 std^2) of the step: how far its log-ratio moves with the network."""

    def with_zero_terminal_snr(self) -> Path:
        """The path whose last training time is noise alone."""

    def time_before(self, t: Tensor, k: int, steps: int) -> Tensor:
        """The time (B,) a share k / steps of the way from the clean image to ``t``."""


@dataclass(frozen=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1: Stable Diffusion's path, with integer timesteps (B,) in [0, T).

    Attributes:
        alpha_bar: (T,) float32, the cumulative signal power of the forward process.
        output: what the network predicts.
    """

    alpha_bar: Tensor
    output: Output

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> VariancePreserving:
        """Read the training schedule out of a diffusers scheduler's config (its sampler plays no part)."""
        table = DDPMScheduler.from_config(scheduler.config).alphas_cumprod.float()
        return cls(table, OUTPUTS[scheduler.config.prediction_type])

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_bar)

    def to(self, device: torch.device | str) -> VariancePreserving:
        """With its table on ``device``."""
        return VariancePreserving(self.alpha_bar.to(device), self.output)

    def at(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Level[Tensor]:
        return Level.from_alpha_bar(self.alpha_bar.to(t.device, dtype)[t.long()].view(-1, 1, 1, 1))

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, in float32, returned in the dtype of ``x0``."""
        return self.at(t).noise(x0.float(), eps.float()).to(x0.dtype)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.output.target(x0, eps, self.at(t))

    def views(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(output, x_t, self.at(t), self.output)

    def draw_times(self, generators: Sequence[torch.Generator], low: int, high: int) -> Tensor:
        return torch.cat([torch.randint(low, high, (1,), generator=generator) for generator in generators])

    def levels(self, scheduler: Any, steps: int | None = None) -> Level[Tensor]:
        """Levels (N + 1,) at the start of a scheduler's N steps and after the last, float32 on the CPU.

        Call after ``scheduler.set_timesteps``. Schedulers with sigmas (Euler, DPM++, UniPC) have alpha_bar =
        1 / (1 + sigma^2) in their variance-preserving view; DDPM-like ones a table by timestep, and end where their
        config says (``set_alpha_to_one``).

        Args:
            steps: how many were asked for, which is N; None is what the scheduler remembers. ``calls.model_calls`` says
                which calls of the denoiser each of them has.
        """
        starts = [place for place, call in enumerate(model_calls(scheduler, steps)) if call.opens]
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) > len(scheduler.timesteps):
            sigmas = torch.cat([sigmas[starts], sigmas[-1:]]).detach().cpu().double()
            return Level.from_alpha_bar((1 / (1 + sigmas**2)).float())
        table = scheduler.alphas_cumprod.cpu()
        last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
        timesteps = scheduler.timesteps.cpu()[starts].long()
        return Level.from_alpha_bar(torch.cat([table[timesteps], last.detach().cpu().view(1)]).float())

    def variance(self, now: Level[Tensor], after: Level[Tensor], eta: float) -> Tensor:
        """eta^2 (1 - ab') / (1 - ab) (1 - ab / ab') (DDIM, 2010.02502, eq. 16); eta = 1 is DDPM's posterior."""
        return eta**2 * after.sigma_sq / now.sigma_sq * (1 - now.alpha_sq / after.alpha_sq)

    def gaussian(self, x: Tensor, x0: Tensor, now: Level[Tensor], after: Level[Tensor], eta: float) -> GaussianStep:
        """DDIM's step (2010.02502, eq. 12): mean = alpha' x0 + sqrt(sigma'^2 - std^2) eps; levels are (B, 1, 1, 1)."""
        variance = self.variance(now, after, eta)
        direction = (after.sigma_sq - variance).clamp(min=0).sqrt()
        return GaussianStep(after.alpha * x0 + direction * now.eps(x, x0), variance.clamp(min=0).sqrt())

    def sensitivity(self, now: Level[Tensor], after: Level[Tensor], eta: float) -> Tensor:
        """(d mean / d eps)^2 / (2 std^2) of the denoiser's noise prediction, (N,): how far a step's ratio moves.

        It differs by orders of magnitude between the steps of one trajectory, so that a few of them fill every clip
        range and every gradient; divide log-ratios by it to make steps count alike (as GRPO-Guard, 2510.22319, does).
        """
        variance = self.variance(now, after, eta)
        slope = (after.sigma_sq - variance).clamp(min=0).sqrt()
        slope = slope - (after.alpha_sq * now.sigma_sq / now.alpha_sq).sqrt()
        return slope**2 / (2 * variance)

    def with_zero_terminal_snr(self) -> VariancePreserving:
        """sqrt(alpha_bar), moved so that the last is 0 and stretched so that the first stays (2305.08891, alg. 1)."""
        signal = self.alpha_bar.double().sqrt()
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        return VariancePreserving(signal.square().float(), self.output)

    def time_before(self, t: Tensor, k: int, steps: int) -> Tensor:
        return t * k // steps
