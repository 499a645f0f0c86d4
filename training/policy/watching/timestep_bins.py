"""Figures by timestep: what a mean over all of them hides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.training.engine.metrics import WeightedMean


@dataclass(frozen=True)
class TimestepBins:
    """Equal ranges of the training timesteps.

    Attributes:
        count: how many; 0 for none.
        num_timesteps: T; bin k holds the times in [k T / count, (k + 1) T / count).
    """

    count: int
    num_timesteps: int

    def name(self, index: int) -> str:
        """Of a bin, by its first and last timestep: t0-199."""
        low, high = (-(-k * self.num_timesteps // self.count) for k in (index, index + 1))
        return f"t{low}-{high - 1}"

    def of(self, t: Tensor) -> Tensor:
        """The bin of each of ``t`` (B,), int64 on its device."""
        return t.long() * self.count // self.num_timesteps

    @torch.no_grad()
    def means(self, t: Tensor, values: Mapping[str, Tensor], among: Tensor | None = None) -> dict[str, WeightedMean]:
        """Mean of each of ``values``, (B,) by name, over the examples in each bin, to be logged as NAME/tLOW-HIGH.

        Args:
            t: (B,) timesteps of the examples.
            among: (B,) bool, the examples that count; None for all.
        """
        if not self.count:
            return {}
        member = self.of(t)[None] == torch.arange(self.count, device=t.device)[:, None]
        if among is not None:
            member &= among
        weights, names = member.sum(dim=1), tuple(self.name(index) for index in range(self.count))
        # Where, not a product: 0 x inf of another bin would be NaN.
        totals = {
            name: torch.where(member, each.float()[None], torch.zeros((), device=t.device)).sum(dim=1)
            for name, each in values.items()
        }
        return {f"{name}/": WeightedMean(total, weights, names) for name, total in totals.items()}
