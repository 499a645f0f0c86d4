"""How fresh noise comes into a reverse step: five published ways, as one kind of Gaussian.

A step from ``now`` to ``after`` has mean = alpha' x0 + c eps and deviation s. Ways differ in s, and in how c makes room
for it. *Keeping* ones take c = sqrt(sigma'^2 - s^2), so that the latents have the noise of the level that they come to.
*First-order* ones, of stochastic differential equations, take c = sigma' - s^2 / (2 sigma): noise is left over, the
more the longer the step. On SD3's grid of ten steps the last but one leaves 27 times what belongs there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import pi, sin
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from .levels import Level

#: What a step may be; "ddim" is for every path.
NoiseKind = Literal["ddim", "cps", "precise", "flow-sde", "dance"]


@dataclass(frozen=True)
class StepKind:
    """One way.

    Attributes:
        variance: s^2 by now, after and the noise level a >= 0; levels (N,) or (B, 1, 1, 1).
        keeps: whether c is sqrt(sigma'^2 - s^2).
        straight: whether it is made for the straight path of flow matching alone.
        most: largest noise level that has a meaning; None for any.
    """

    variance: Callable[[Level[Any], Level[Any], float], Tensor]
    keeps: bool = True
    straight: bool = False
    most: float | None = None

    def direction(self, now: Level[Tensor], after: Level[Tensor], variance: Tensor) -> Tensor:
        """c, the share of the predicted noise, like the levels' tensors."""
        if self.keeps:
            return (after.sigma_sq - variance).clamp(min=0).sqrt()
        return after.sigma - variance / (2 * now.sigma)

    def noise_left(self, now: Level[Tensor], after: Level[Tensor], variance: Tensor) -> Tensor:
        """Noise of the latents after a step from perfect predictions, in shares of the level that it comes to, like
        the levels' tensors: 1 where it is kept; not a number where first-order kinds come to a clean picture."""
        if self.keeps:
            return torch.ones_like(variance)
        return ((self.direction(now, after, variance) ** 2 + variance) / after.sigma_sq).sqrt()


def ddim(now: Level[Any], after: Level[Any], a: float) -> Tensor:
    """a^2 sigma'^2 / sigma^2 (sigma^2 - (alpha / alpha')^2 sigma'^2) (DDIM, 2010.02502, eq. 16, for any path)."""
    left = now.sigma_sq - now.alpha_sq / after.alpha_sq * after.sigma_sq
    return a**2 * after.sigma_sq / now.sigma_sq * left


def cps(now: Level[Any], after: Level[Any], a: float) -> Tensor:
    """(sigma' sin(a pi / 2))^2 (Coefficients-Preserving Sampling, 2509.05952); a = 1 draws all noise anew."""
    return after.sigma_sq * sin(a * pi / 2) ** 2


def precise(now: Level[Any], after: Level[Any], a: float) -> Tensor:
    """sigma'^2 (1 - rho^(a^2)), rho = sigma' alpha / (sigma alpha'): an SDE's exact step; a = sqrt(2) is DDPM's."""
    rho = after.sigma * now.alpha / (now.sigma * after.alpha)
    return after.sigma_sq * (1 - rho ** (a**2))


def flow_sde(now: Level[Any], after: Level[Any], a: float) -> Tensor:
    """a^2 sigma / (1 - sigma) |dt| (Flow-GRPO, 2505.05470); at sigma = 1 the divisor is that of the next level."""
    image = torch.where(now.alpha > 0, now.alpha, after.alpha)
    return _unless_last(after, a**2 * now.sigma / image * (now.sigma - after.sigma))


def dance(now: Level[Any], after: Level[Any], a: float) -> Tensor:
    """a^2 |dt| (DanceGRPO, 2505.07818)."""
    return _unless_last(after, a**2 * (now.sigma - after.sigma))


def _unless_last(after: Level[Any], variance: Tensor) -> Tensor:
    """0 where the picture is done: it would keep the noise."""
    return torch.where(after.sigma_sq > 0, variance, torch.zeros_like(variance))


KINDS: Mapping[str, StepKind] = MappingProxyType(
    {
        "ddim": StepKind(ddim),
        "cps": StepKind(cps, most=1.0),
        "precise": StepKind(precise),
        "flow-sde": StepKind(flow_sde, keeps=False, straight=True),
        "dance": StepKind(dance, keeps=False, straight=True),
    }
)


def step_kind(name: str, level: float, straight: bool) -> StepKind:
    """The way that is called ``name``.

    Args:
        level: the noise level that it is to have.
        straight: whether it is for the straight path.

    Raises:
        ValueError: there is none, it is for the straight path alone, or the level has no meaning.
    """
    if name not in KINDS:
        raise ValueError(f"noise_kind {name!r}: expected one of {', '.join(KINDS)}")
    kind = KINDS[name]
    if kind.straight and not straight:
        others = ", ".join(other for other, each in KINDS.items() if not each.straight)
        raise ValueError(f"noise_kind {name} is for flow models: expected one of {others}")
    if level < 0 or (kind.most is not None and level > kind.most):
        upper = "" if kind.most is None else f" to {kind.most:g}"
        raise ValueError(f"noise_kind {name}: a noise level of {level:g}, expected 0{upper or ' or more'}")
    return kind
