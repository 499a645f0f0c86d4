"""Flow matching's path: the straight way x_sigma = (1 - sigma) x0 + sigma eps (rectified flow, 2209.03003)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .calls import openings
from .flow_sampler import FlowSampler
from .gate import is_flow
from .levels import StraightLevel
from .outputs import FLOW, Output, Prediction
from .path import Path, PathAlgebra, VariancePreserving
from .step_kinds import KINDS, NoiseKind, step_kind

#: Least sigma that is trained at: below, the picture is done, and weights by 1 / sigma have no bound.
SMALLEST_SIGMA = 1e-3


@dataclass(frozen=True)
class Shift:
    """A move of times towards noise: logit(sigma') = logit(sigma) + offset.

    A *static* shift s (SD3, 2403.03206, eq. 23) is s sigma / (1 + (s - 1) sigma), whose offset is ln s. A *dynamic* one
    (FLUX) is a line in the number of tokens, mu: offset mu, so that larger pictures see more noise.

    Attributes:
        static: s > 0; not read where ``dynamic`` is there.
        dynamic: (mu at the first, mu at the second, first, second number of tokens).
        linear: the dynamic shift is mu sigma / (1 + (mu - 1) sigma), offset ln mu (``time_shift_type: linear``).
    """

    static: float = 1.0
    dynamic: tuple[float, float, int, int] | None = None
    linear: bool = False

    @classmethod
    def of(cls, config: Any) -> Shift:
        """As a diffusers scheduler's config has it."""
        if config.get("use_dynamic_shifting"):
            line = tuple(config.get(name, usual) for name, usual in (
                ("base_shift", 0.5), ("max_shift", 1.15), ("base_image_seq_len", 256), ("max_image_seq_len", 4096)
            ))  # fmt: skip
            return cls(dynamic=line, linear=config.get("time_shift_type") == "linear")
        static = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift")
        return cls(1.0 if static is None else float(static))

    def mu(self, tokens: int) -> float:
        """The dynamic shift of a picture of ``tokens`` tokens, which diffusers' ``set_timesteps`` takes."""
        assert self.dynamic is not None
        low, high, first, last = self.dynamic
        slope = (high - low) / (last - first)
        return tokens * slope + (low - slope * first)

    def offset(self, tokens: int) -> float:
        """What is added to logit(sigma) of a picture of ``tokens`` tokens."""
        if self.dynamic is None:
            return math.log(self.static)
        return math.log(self.mu(tokens)) if self.linear else self.mu(tokens)


@dataclass(frozen=True)
class TimeDensity:
    """How training times are drawn, before the shift and within [low, high].

    Attributes:
        kind: "logit-normal": logit(sigma) = mean + std z (2403.03206, eq. 19), so that a mean above 0 sees *more noise*
            (diffusers' scripts count the other way); or "uniform".
        mean, std: of the normal number z.
        low, high: least and largest sigma after the shift.
    """

    kind: Literal["logit-normal", "uniform"] = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def draw(self, generators: Sequence[torch.Generator], offset: float) -> Tensor:
        """Times (B,) float32, one from each CPU generator: the density, moved by ``offset`` in logit, cut to the
        range and at least ``SMALLEST_SIGMA``."""
        share = torch.cat([torch.rand(1, generator=each, dtype=torch.float64) for each in generators])
        ends = torch.tensor([self.low, self.high], dtype=torch.float64).logit() - offset
        if self.kind == "uniform":
            low, high = ends.sigmoid()
            logit = (low + (high - low) * share).logit()
        else:
            low, high = torch.special.ndtr((ends - self.mean) / self.std)
            logit = self.mean + self.std * torch.special.ndtri(low + (high - low) * share)
        return (logit + offset).sigmoid().clamp(SMALLEST_SIGMA, 1).float()


@dataclass(frozen=True)
class FlowMatching(PathAlgebra):
    """The path of SD3 and FLUX; its times (B,) float32 are sigma, the share of noise, in [0, 1].

    Attributes:
        shift: the pipeline's own.
        num_timesteps: T; networks and figures know sigma as T sigma.
        output: eps - x0.
    """

    shift: Shift = Shift()
    num_timesteps: int = 1000
    output: Output = FLOW
    straight: ClassVar[bool] = True

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> FlowMatching:
        """The path that a diffusers flow scheduler belongs to.

        Raises:
            ValueError: a scheduler of another process.
        """
        if not is_flow(scheduler):
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} is not of flow matching, which this model's family needs: "
                "expected e.g. FlowMatchEulerDiscreteScheduler"
            )
        return cls(Shift.of(scheduler.config), scheduler.config.num_train_timesteps)

    @property
    def span(self) -> tuple[float, float]:
        return 0.0, 1.0

    def to(self, device: torch.device | str) -> FlowMatching:
        """It holds nothing."""
        return self

    def at(self, t: Tensor, dtype: torch.dtype = torch.float32) -> StraightLevel[Tensor]:
        return StraightLevel.from_sigma(t.to(dtype).view(-1, 1, 1, 1))

    def clean(self, x0: Tensor) -> StraightLevel[Tensor]:
        return StraightLevel.from_sigma(torch.zeros_like(x0[:, :1, :1, :1]))

    def check_times(self, t: Tensor) -> None:
        if float(t.min()) < 0 or float(t.max()) > 1:
            raise ValueError(f"times {t.tolist()} must lie in [0, 1]")

    def timestep(self, t: Tensor) -> Tensor:
        return (t * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def moving(self, prediction: Prediction) -> Tensor:
        return prediction.flow

    def split(self, x: Tensor, moving: Tensor, level: Any) -> tuple[Tensor, Tensor]:
        return FLOW.x0(moving, x, level), FLOW.eps(moving, x, level)

    def draw_times(self, generators: Sequence[torch.Generator], low: float, high: float) -> Tensor:
        return TimeDensity("uniform", low=low, high=high).draw(generators, 0.0)

    def times(self, scheduler: Any) -> Tensor:
        return (scheduler.timesteps.detach().cpu().double() / self.num_timesteps).float()

    def levels(self, scheduler: Any, steps: int | None = None) -> StraightLevel[Tensor]:
        """Levels (N + 1,) at the start of a scheduler's N steps and after the last, float32 on the CPU.

        They are read from the scheduler, after ``set_timesteps``. diffusers' own formula is not written here a second
        time: it shifts twice where the shift is static (0.42), and pictures are to be the pipeline's.
        """
        starts = openings(scheduler, steps)
        sigmas = scheduler.sigmas.detach().cpu()
        return StraightLevel.from_sigma(torch.cat([sigmas[starts], sigmas[-1:]]).float())

    def step_levels(self, scheduler: Any, steps: int | None = None) -> list[Any]:
        return [StraightLevel.from_sigma(sigma) for sigma in self.levels(scheduler, steps).sigma.tolist()]

    def call_level(self, scheduler: Any, place: int) -> StraightLevel[float]:
        return StraightLevel.from_sigma(float(scheduler.sigmas[place]))

    def sampler(self, scheduler: Any, kind: NoiseKind = "ddim") -> FlowSampler:
        return FlowSampler(scheduler, self, kind)

    def variance(self, now: Any, after: Any, eta: float, kind: NoiseKind = "ddim") -> Tensor:
        return step_kind(kind, eta, straight=True).variance(now, after, eta)

    def sensitivity(self, now: Any, after: Any, eta: float, kind: NoiseKind = "ddim") -> Tensor:
        """(d mean / d u)^2 / (2 std^2) of the flow u, (N,): d mean / d u = (1 - sigma) c - (1 - sigma') sigma."""
        variance = self.variance(now, after, eta, kind)
        slope = now.alpha * KINDS[kind].direction(now, after, variance) - after.alpha * now.sigma
        return slope**2 / (2 * variance)

    def with_zero_terminal_snr(self) -> FlowMatching:
        """It ends in noise alone as it is."""
        return self

    def previous(self, t: Tensor) -> Tensor:
        return (t - 1 / self.num_timesteps).clamp(min=0)

    def time_before(self, t: Tensor, k: int, steps: int) -> Tensor:
        return t * k / steps

    def facts(self) -> list[Any]:
        return ["flow", repr(self.shift)]


def path_of(scheduler: Any) -> Path:
    """The path that a model with this diffusers scheduler was trained on, by the scheduler's class."""
    return (
        FlowMatching.from_scheduler(scheduler) if is_flow(scheduler) else VariancePreserving.from_scheduler(scheduler)
    )
