"""What a denoiser was trained to give (noise, velocity or clean latents), and its output seen as each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from .levels import Level

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class Output:
    """A kind of network output, as functions of tensors (B, C, h, w) and a level.

    Attributes:
        target: (x0, eps, level) to what the network should give.
        x0, eps, v: (output, x, level) to clean latents, noise, and velocity v = alpha eps - sigma x0 (2202.00512).
    """

    target: Callable[[Tensor, Tensor, Level[Any]], Tensor]
    x0: Callable[[Tensor, Tensor, Level[Any]], Tensor]
    eps: Callable[[Tensor, Tensor, Level[Any]], Tensor]
    v: Callable[[Tensor, Tensor, Level[Any]], Tensor]


def velocity(x0: Tensor, eps: Tensor, level: Level[Any]) -> Tensor:
    """alpha eps - sigma x0, (B, C, h, w)."""
    return level.alpha * eps - level.sigma * x0


#: By the name in a scheduler's config. alpha^2 + sigma^2 = 1 is used by the velocity's views.
OUTPUTS: Mapping[str, Output] = MappingProxyType(
    {
        "epsilon": Output(
            target=lambda x0, eps, level: eps,
            x0=lambda out, x, level: level.x0(x, out),
            eps=lambda out, x, level: out,
            v=lambda out, x, level: velocity(level.x0(x, out), out, level),
        ),
        "v_prediction": Output(
            target=velocity,
            x0=lambda out, x, level: level.alpha * x - level.sigma * out,
            eps=lambda out, x, level: level.alpha * out + level.sigma * x,
            v=lambda out, x, level: out,
        ),
        "sample": Output(
            target=lambda x0, eps, level: x0,
            x0=lambda out, x, level: out,
            eps=lambda out, x, level: level.eps(x, out),
            v=lambda out, x, level: velocity(out, level.eps(x, out), level),
        ),
    }
)

#: Flow matching's output, the way's direction u = eps - x0 = dx/dsigma at x = (1 - sigma) x0 + sigma eps. It is another
#: quantity than the velocity alpha eps - sigma x0 of variance-preserving paths.
FLOW = Output(
    target=lambda x0, eps, level: eps - x0,
    x0=lambda out, x, level: x - level.sigma * out,
    eps=lambda out, x, level: x + level.alpha * out,
    v=lambda out, x, level: velocity(x - level.sigma * out, x + level.alpha * out, level),
)


def min_snr_weight(kind: Output, level: Level[Tensor], gamma: float) -> Tensor:
    """Weights of squared errors of raw outputs: min(SNR, gamma) times what makes them errors of x0 (2303.09556).

    For noise min(SNR, gamma) / SNR, for the velocity min(SNR, gamma) / (SNR + 1), for clean latents min(SNR, gamma),
    for the flow min(SNR, gamma) sigma^2.
    Noise alone (SNR 0) has the limit for predicted noise, 1.

    Args:
        level: (B, 1, 1, 1).

    Returns:
        Like the level's tensors.
    """
    nothing, one = torch.zeros_like(level.alpha_sq), torch.ones_like(level.alpha_sq)
    slope = kind.x0(one, nothing, level) - kind.x0(nothing, nothing, level)
    snr = level.alpha_sq / level.sigma_sq
    return (snr.clamp(max=gamma) * slope.square()).nan_to_num(nan=1.0)


@dataclass(frozen=True)
class Prediction:
    """A denoiser's output seen as noise, clean latents, velocity or flow, whichever it was trained to give.

    Attributes:
        output: raw network output, (B, C, h, w), float32.
        x_t: the noisy latents it was given, (B, C, h, w), float32.
        level: of ``x_t``, (B, 1, 1, 1), float32.
        kind: what ``output`` is.
    """

    output: Tensor
    x_t: Tensor
    level: Level[Tensor]
    kind: Output

    @property
    def eps(self) -> Tensor:
        """The noise, (B, C, h, w)."""
        return self.kind.eps(self.output, self.x_t, self.level)

    @property
    def x0(self) -> Tensor:
        """The clean latents, (B, C, h, w)."""
        return self.kind.x0(self.output, self.x_t, self.level)

    @property
    def v(self) -> Tensor:
        """The velocity alpha eps - sigma x0, (B, C, h, w)."""
        return self.kind.v(self.output, self.x_t, self.level)

    @property
    def flow(self) -> Tensor:
        """eps - x0, (B, C, h, w): what flow models are trained to give."""
        return self.output if self.kind is FLOW else self.eps - self.x0
