"""How long the guidance term is that a way to guide adds, and at which scale classifier-free guidance adds as much."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from diffusion_align.sampling.control import GuidedStep


@dataclass
class TermMeter:
    """Measures |eps - eps_u| at every step of the runs it is given to: ``SamplingOptions(on_guided=meter)``.

    At scale w of classifier-free guidance that is w |eps_c - eps_u|. It costs two more calls a step, which are not
    counted as the run's.
    """

    lengths: list[float] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, step: GuidedStep) -> None:
        _, unconditional = step.plain(None)
        moved = (step.output.double() - unconditional.double()).flatten(1)
        self.lengths += moved.norm(dim=1).tolist()

    def mean(self) -> float:
        """Over pictures and steps.

        Raises:
            ValueError: nothing was measured.
        """
        if not self.lengths:
            raise ValueError("no step was measured: give the meter to a run as SamplingOptions(on_guided=meter)")
        return sum(self.lengths) / len(self.lengths)


def scale_of_length(length: float, measured: Mapping[float, float]) -> float:
    """The scale at which the term is ``length`` long, by straight lines between scales that were measured; beyond them
    along the last one, but never below 1, where nothing is guided.

    Args:
        measured: mean length by scale, of at least two scales.

    Raises:
        ValueError: lengths that do not grow with the scale: guidance has no effect on this model.
    """
    scales = sorted(measured)
    lengths = [measured[scale] for scale in scales]
    if len(scales) < 2 or any(b <= a for a, b in itertools.pairwise(lengths)):
        told = ", ".join(f"{scale:g}: {measured[scale]:.4g}" for scale in scales)
        raise ValueError(f"the guidance term does not grow with the scale ({told}): no scale matches another's")
    place = next((i for i, known in enumerate(lengths[1:-1], start=1) if length <= known), len(scales) - 1)
    (low, high), (near, far) = scales[place - 1 : place + 1], lengths[place - 1 : place + 1]
    return max(1.0, low + (length - near) / (far - near) * (high - low))
