"""The steps of the sampler that rollouts are drawn with: their levels, their noise, and which are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.process import KINDS, GaussianStep, Level, NoiseKind, Path

from .config import Stepping

#: Steps with less noise than this are as good as deterministic: their log-probabilities are not trained on.
SMALLEST_STD = 1e-3
#: The same of flow models, whose grids end in a step to a nearly clean picture: SD3's to 0.009.
SMALLEST_STD_OF_FLOW = 1e-2
#: A step may leave at most so many times the noise of the level that it comes to; the scorer would see the rest.
MOST_NOISE = 1.25


@dataclass(frozen=True)
class NoisySteps:
    """N sampling steps.

    Attributes:
        path: the model's.
        kind: how fresh noise comes in.
        level: how much.
        levels: (N + 1,) at every step and after the last, on the CPU.
        times: (N,), in the path's unit, on the CPU.
        drawing: (D,) int64, the steps that may draw noise.
        noisy: (M,) int64, those of them that are trained on.
    """

    path: Path
    kind: NoiseKind
    level: float
    levels: Level[Tensor]
    times: Tensor
    drawing: Tensor
    noisy: Tensor

    @classmethod
    def of(cls, config: Stepping, adapter: Adapter, scheduler: Any, least: float, most: float) -> NoisySteps:
        """Those of ``scheduler``, after ``set_timesteps``.

        Args:
            least, most: smallest and largest time that is trained on.

        Raises:
            ValueError: a kind or level of noise that the path has not.
        """
        path, levels = adapter.path, adapter.path.levels(scheduler)
        now, after = levels[:-1], levels[1:]
        variance = path.variance(now, after, config.level, config.noise_kind)
        enough = variance.clamp(min=0).sqrt() > (SMALLEST_STD_OF_FLOW if path.straight else SMALLEST_STD)
        within = KINDS[config.noise_kind].noise_left(now, after, variance) <= MOST_NOISE
        times = path.times(scheduler).cpu()
        noisy = enough & within & (times >= least) & (times <= most)
        drawing = enough & within if path.straight else torch.ones_like(enough)
        places = drawing.nonzero().flatten(), noisy.nonzero().flatten()
        return cls(path, config.noise_kind, config.level, levels, times, *places)

    def __len__(self) -> int:
        return len(self.times)

    @property
    def etas(self) -> list[float]:
        """Noise level of every step where all draw noise that may."""
        return self.etas_in(self.drawing)

    def etas_in(self, window: Tensor) -> list[float]:
        """Noise level of every step where those of ``window`` alone draw noise."""
        chosen = set(window.tolist())
        return [self.level if step in chosen else 0.0 for step in range(len(self))]

    def scales(self) -> Tensor:
        """What log-ratios are multiplied with, (N,), so that all steps' ratios move alike."""
        moves = self.path.sensitivity(self.levels[:-1], self.levels[1:], self.level, self.kind).sqrt()
        return moves[self.noisy].mean() / moves

    def gaussian(self, x: Tensor, x0: Tensor, steps: Tensor, eta: float | None = None) -> GaussianStep:
        """Of latents (B, C, h, w) and their predicted clean ones, at ``steps`` (B,) on the CPU.

        Args:
            eta: the steps' noise level; None is ``level``.
        """
        now, after = (self.levels[places].to(x.device).column() for places in (steps, steps + 1))
        return self.path.gaussian(x, x0, now, after, self.level if eta is None else eta, self.kind)

    def check(self, wanted: int | str) -> int:
        """How many steps are trained on where ``train_steps`` are ``wanted``.

        Raises:
            ValueError: there are fewer, or none.
        """
        count = len(self.noisy) if wanted == "all" else int(wanted)
        if 0 < count <= len(self.noisy):
            return count
        found = f"train_steps = {wanted}: only {len(self.noisy)} of the sampling steps have noise and a time within "
        if not self.path.straight:
            raise ValueError(f"{found}what min_timestep asks for")
        raise ValueError(
            f"{found}min_time and max_time; the last steps draw none, nor do those where noise_kind {self.kind} "
            f"leaves more than {MOST_NOISE:g} times what belongs to the next level: set train_steps to fewer, or take "
            "another noise_kind"
        )
