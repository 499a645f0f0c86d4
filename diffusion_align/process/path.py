"""The path from images to noise that a model was trained on, and everything that follows from it.

A path is stateless. Other rooms ask it; none of them writes a square root of alpha_bar.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from .calls import call_level, openings
from .gate import is_flow
from .levels import Level
from .outputs import OUTPUTS, Output, Prediction
from .step_kinds import KINDS, NoiseKind, step_kind
from .steps import GaussianStep


def scaled_linear(steps: int = 1000) -> Tensor:
    """Stable Diffusion's alpha_bar (steps,) float64, whose betas grow with the square of a line."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


class Path(Protocol):
    """What models, samplers and methods ask.

    Times ``t`` (B,) are in the path's own unit: integer timesteps of a variance-preserving path, sigma in [0, 1] of
    flow matching.
    """

    @property
    def output(self) -> Output:
        """What the network predicts."""

    @property
    def straight(self) -> bool:
        """Whether it is flow matching's."""

    @property
    def num_timesteps(self) -> int:
        """How many training times there are, as ``timestep`` counts them."""

    @property
    def span(self) -> tuple[float, float]:
        """Least and largest time that there is, as ``draw_times`` takes them."""

    def to(self, device: torch.device | str) -> Path:
        """With what it holds on ``device``."""

    def at(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Level[Tensor]:
        """Levels (B, 1, 1, 1) at times ``t`` (B,), on their device, computed in ``dtype``."""

    def clean(self, x0: Tensor) -> Level[Tensor]:
        """The level (B, 1, 1, 1) of clean latents (B, C, h, w), in their dtype."""

    def check_times(self, t: Tensor) -> None:
        """Raises ValueError where ``t`` (B,) on the CPU are no times of this path."""

    def timestep(self, t: Tensor) -> Tensor:
        """Times (B,) as whole numbers in [0, num_timesteps), for figures by timestep."""

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps, (B, C, h, w), in the dtype of ``x0``."""

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network's raw output should be at ``noise(x0, eps, t)``, (B, C, h, w)."""

    def views(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """A raw output (B, C, h, w) for ``x_t`` as x0, eps and v."""

    def moving(self, prediction: Prediction) -> Tensor:
        """What ``sensitivity`` and ``split`` speak of, (B, C, h, w): the noise, of flow matching the flow."""

    def split(self, x: Tensor, moving: Tensor, level: Level[Tensor]) -> tuple[Tensor, Tensor]:
        """Clean latents and noise, (B, C, h, w) each, of ``x`` at ``level`` where ``moving`` is as that says."""

    def draw_times(self, generators: Sequence[torch.Generator], low: float, high: float) -> Tensor:
        """Training times (B,), uniform in [low, high), one from each CPU generator."""

    def times(self, scheduler: Any) -> Tensor:
        """Time of each call of the network, in the path's unit, on the CPU; after ``set_timesteps``."""

    def levels(self, scheduler: Any, steps: int | None = None) -> Level[Tensor]:
        """Levels (N + 1,) at the start of a scheduler's N steps and after the last, float32 on the CPU."""

    def step_levels(self, scheduler: Any, steps: int | None = None) -> list[Level[float]]:
        """``levels`` as N + 1 of plain numbers."""

    def call_level(self, scheduler: Any, place: int) -> Level[float]:
        """The level of the latents that the network is given in call ``place``, which ``scheduler`` has come to."""

    def sampler(self, scheduler: Any, kind: NoiseKind = "ddim") -> Any:
        """A scheduler on the grid of ``scheduler`` whose steps are ``gaussian``'s: its ``step`` takes ``eta`` and
        ``variance_noise`` (B, C, h, w) as diffusers' DDIM does."""

    def variance(self, now: Level[Tensor], after: Level[Tensor], eta: float, kind: NoiseKind = "ddim") -> Tensor:
        """Variance of the fresh noise in a step from ``now`` to ``after``, like their tensors.

        Args:
            eta: the noise level of ``kind``; of "ddim" DDIM's eta.
        """

    def gaussian(
        self, x: Tensor, x0: Tensor, now: Level[Tensor], after: Level[Tensor], eta: float, kind: NoiseKind = "ddim"
    ) -> GaussianStep:
        """The step from ``x`` (B, C, h, w) with predicted clean latents ``x0``."""

    def sensitivity(self, now: Level[Tensor], after: Level[Tensor], eta: float, kind: NoiseKind = "ddim") -> Tensor:
        """(d mean / d moving)^2 / (2 std^2) of the step: how far its log-ratio moves with the network."""

    def with_zero_terminal_snr(self) -> Path:
        """The path whose last training time is noise alone."""

    def previous(self, t: Tensor) -> Tensor:
        """The time (B,) that one step of the training chain leads to, 0 at the least."""

    def time_before(self, t: Tensor, k: int, steps: int) -> Tensor:
        """The time (B,) a share k / steps of the way from the clean image to ``t``."""

    def facts(self) -> list[Any]:
        """What of it a remembered error depends on; JSON-able."""


class PathAlgebra(ABC):
    """What follows from a path's levels alone, whatever they are.

    Attributes:
        output: what the network predicts.
    """

    output: Output

    @abstractmethod
    def at(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Level[Tensor]:
        """As :class:`Path` says."""

    @abstractmethod
    def variance(self, now: Level[Tensor], after: Level[Tensor], eta: float, kind: NoiseKind = "ddim") -> Tensor:
        """As :class:`Path` says."""

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps, in float32, returned in the dtype of ``x0``."""
        return self.at(t).noise(x0.float(), eps.float()).to(x0.dtype)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.output.target(x0, eps, self.at(t))

    def views(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(output, x_t, self.at(t), self.output)

    def gaussian(
        self, x: Tensor, x0: Tensor, now: Level[Tensor], after: Level[Tensor], eta: float, kind: NoiseKind = "ddim"
    ) -> GaussianStep:
        """mean = alpha' x0 + c eps, std s; DDIM's (2010.02502, eq. 12) has c = sqrt(sigma'^2 - s^2); levels are
        (B, 1, 1, 1)."""
        variance = self.variance(now, after, eta, kind)
        direction = KINDS[kind].direction(now, after, variance)
        return GaussianStep(after.alpha * x0 + direction * now.eps(x, x0), variance.clamp(min=0).sqrt())


@dataclass(frozen=True)
class VariancePreserving(PathAlgebra):
    """alpha^2 + sigma^2 = 1: Stable Diffusion's path, with integer timesteps (B,) in [0, T).

    Attributes:
        alpha_bar: (T,) float32, the cumulative signal power of the forward process.
        output: what the network predicts.
    """

    alpha_bar: Tensor
    output: Output
    straight: ClassVar[bool] = False

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> VariancePreserving:
        """Read the training schedule out of a diffusers scheduler's config (its sampler plays no part).

        Raises:
            ValueError: a scheduler of flow matching, whose config would be read as a table without a word.
        """
        if is_flow(scheduler):
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} is of flow matching, which no variance-preserving path has: "
                "take path_of(scheduler)"
            )
        table = DDPMScheduler.from_config(scheduler.config).alphas_cumprod.float()
        return cls(table, OUTPUTS[scheduler.config.prediction_type])

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_bar)

    @property
    def span(self) -> tuple[float, float]:
        return 0, self.num_timesteps

    def to(self, device: torch.device | str) -> VariancePreserving:
        """With its table on ``device``."""
        return VariancePreserving(self.alpha_bar.to(device), self.output)

    def at(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Level[Tensor]:
        return Level.from_alpha_bar(self.alpha_bar.to(t.device, dtype)[t.long()].view(-1, 1, 1, 1))

    def clean(self, x0: Tensor) -> Level[Tensor]:
        return Level.from_alpha_bar(torch.ones_like(x0[:, :1, :1, :1]))

    def check_times(self, t: Tensor) -> None:
        if int(t.min()) < 0 or int(t.max()) >= self.num_timesteps:
            raise ValueError(f"timesteps {t.tolist()} must lie in [0, {self.num_timesteps})")

    def timestep(self, t: Tensor) -> Tensor:
        return t.long()

    def moving(self, prediction: Prediction) -> Tensor:
        return prediction.eps

    def split(self, x: Tensor, moving: Tensor, level: Level[Tensor]) -> tuple[Tensor, Tensor]:
        return level.x0(x, moving), moving

    def draw_times(self, generators: Sequence[torch.Generator], low: float, high: float) -> Tensor:
        first, last = int(low), int(high)
        return torch.cat([torch.randint(first, last, (1,), generator=generator) for generator in generators])

    def times(self, scheduler: Any) -> Tensor:
        found: Tensor = scheduler.timesteps
        return found

    def levels(self, scheduler: Any, steps: int | None = None) -> Level[Tensor]:
        """Levels (N + 1,) at the start of a scheduler's N steps and after the last, float32 on the CPU.

        Call after ``scheduler.set_timesteps``. Schedulers with sigmas (Euler, DPM++, UniPC) have alpha_bar =
        1 / (1 + sigma^2) in their variance-preserving view; DDPM-like ones a table by timestep, and end where their
        config says (``set_alpha_to_one``).

        Args:
            steps: how many were asked for, which is N; None is what the scheduler remembers. ``calls.model_calls`` says
                which calls of the denoiser each of them has.
        """
        starts = openings(scheduler, steps)
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) > len(scheduler.timesteps):
            sigmas = torch.cat([sigmas[starts], sigmas[-1:]]).detach().cpu().double()
            return Level.from_alpha_bar((1 / (1 + sigmas**2)).float())
        table = scheduler.alphas_cumprod.cpu()
        last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
        timesteps = scheduler.timesteps.cpu()[starts].long()
        return Level.from_alpha_bar(torch.cat([table[timesteps], last.detach().cpu().view(1)]).float())

    def step_levels(self, scheduler: Any, steps: int | None = None) -> list[Level[float]]:
        return [Level.from_alpha_bar(signal) for signal in self.levels(scheduler, steps).alpha_sq.tolist()]

    def call_level(self, scheduler: Any, place: int) -> Level[float]:
        return call_level(scheduler, scheduler.timesteps[place])

    def sampler(self, scheduler: Any, kind: NoiseKind = "ddim") -> Any:
        """diffusers' DDIM, which has the first kind of noise alone.

        Raises:
            ValueError: another kind.
        """
        if kind != "ddim":
            raise ValueError(f"noise_kind {kind}: this model draws its own pictures by DDIM, expected ddim")
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False)

    def variance(self, now: Level[Tensor], after: Level[Tensor], eta: float, kind: NoiseKind = "ddim") -> Tensor:
        """eta^2 (1 - ab') / (1 - ab) (1 - ab / ab') (DDIM, 2010.02502, eq. 16); eta = 1 is DDPM's posterior."""
        if kind != "ddim":
            return step_kind(kind, eta, straight=False).variance(now, after, eta)
        return eta**2 * after.sigma_sq / now.sigma_sq * (1 - now.alpha_sq / after.alpha_sq)

    def sensitivity(self, now: Level[Tensor], after: Level[Tensor], eta: float, kind: NoiseKind = "ddim") -> Tensor:
        """(d mean / d eps)^2 / (2 std^2) of the denoiser's noise prediction, (N,): how far a step's ratio moves.

        It differs by orders of magnitude between the steps of one trajectory, so that a few of them fill every clip
        range and every gradient; divide log-ratios by it to make steps count alike (as GRPO-Guard, 2510.22319, does).
        """
        variance = self.variance(now, after, eta, kind)
        slope = KINDS[kind].direction(now, after, variance)
        slope = slope - (after.alpha_sq * now.sigma_sq / now.alpha_sq).sqrt()
        return slope**2 / (2 * variance)

    def with_zero_terminal_snr(self) -> VariancePreserving:
        """sqrt(alpha_bar), moved so that the last is 0 and stretched so that the first stays (2305.08891, alg. 1)."""
        signal = self.alpha_bar.double().sqrt()
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        return VariancePreserving(signal.square().float(), self.output)

    def previous(self, t: Tensor) -> Tensor:
        return (t - 1).clamp(min=0)

    def time_before(self, t: Tensor, k: int, steps: int) -> Tensor:
        return t * k // steps

    def facts(self) -> list[Any]:
        names = {id(kind): name for name, kind in OUTPUTS.items()}
        return [names[id(self.output)], hashlib.sha256(str(self.alpha_bar.tolist()).encode()).hexdigest()]
