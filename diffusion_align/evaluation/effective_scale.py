"""Which guidance scale a method amounts to: a gain may be no more than a larger scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EffectiveScale:
    """What a guided prediction is beside classifier-free guidance.

    Attributes:
        scale: w_e of each picture, (B,): at this scale classifier-free guidance comes nearest to it.
        orthogonal: share of its move away from the unconditional prediction that no scale explains, (B,) in [0, 1].
    """

    scale: Tensor
    orthogonal: Tensor


@torch.no_grad()
def effective_scale(guided: Tensor, conditional: Tensor, unconditional: Tensor) -> EffectiveScale:
    """The projection of a guided prediction on delta = eps_c - eps_u.

    w_e = <eps - eps_u, delta> / |delta|^2, and the orthogonal share is |eps - eps_u - w_e delta|^2 / |eps - eps_u|^2.
    Average w_e over steps and seeds, and put classifier-free guidance at that scale beside the method. Where both
    predictions are one and the same there is no scale: NaN. A prediction that is the unconditional one has share 0.

    Args:
        guided, conditional, unconditional: noise predictions (B, C, h, w) at the same noisy latents.

    Raises:
        ValueError: shapes differ.
    """
    if not guided.shape == conditional.shape == unconditional.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (guided, conditional, unconditional))
        raise ValueError(f"guided, conditional and unconditional: expected one shape, got {shapes}")
    base = unconditional.double().flatten(1)
    moved, delta = guided.double().flatten(1) - base, conditional.double().flatten(1) - base
    scale = (moved * delta).sum(dim=1) / delta.square().sum(dim=1)
    left, whole = (moved - scale[:, None] * delta).square().sum(dim=1), moved.square().sum(dim=1)
    return EffectiveScale(scale, torch.where(whole > 0, left / whole, torch.zeros_like(whole)))
