"""Which guidance scale a method amounts to: a gain may be no more than a larger scale."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.sampling.control import GuidedStep


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
        guided, conditional, unconditional: predictions (B, C, h, w) at the same noisy latents, of the noise or of
            whatever the model predicts: at one noise level the others are affine in it, and both figures stay.

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


@dataclass(frozen=True)
class MeanScale:
    """What a way to guide amounts to over whole runs.

    Attributes:
        scale: mean w_e over pictures and steps.
        orthogonal: mean share that no scale explains.
        by_step: mean w_e of each step, (steps,).
    """

    scale: float
    orthogonal: float
    by_step: list[float]


@dataclass
class ScaleMeter:
    """Measures every step of the runs it is given to: ``SamplingOptions(on_guided=meter)``.

    It costs two more calls a step, which are not counted as the run's.

    Attributes:
        model: whose classifier-free guidance it is put beside; None: the run's own.
        found: by step, what was found in each batch.
    """

    model: Adapter | None = None
    found: dict[int, list[EffectiveScale]] = field(default_factory=dict)

    def __call__(self, step: GuidedStep) -> None:
        self.found.setdefault(step.view.step, []).append(effective_scale(step.output, *step.plain(self.model)))

    def mean(self) -> MeanScale:
        """Over pictures, then over steps; where both predictions are one there is nothing to count.

        Raises:
            ValueError: nothing was measured.
        """
        if not self.found:
            raise ValueError("no step was measured: give the meter to a run as SamplingOptions(on_guided=meter)")
        steps = [self.found[step] for step in sorted(self.found)]
        scales = torch.stack([torch.cat([each.scale for each in step]).nanmean() for step in steps])
        shares = torch.stack([torch.cat([each.orthogonal for each in step]).nanmean() for step in steps])
        return MeanScale(float(scales.nanmean()), float(shares.nanmean()), scales.tolist())
