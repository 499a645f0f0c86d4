"""Running means of liked and of disliked pictures, over all processes: what KTO and BCO compare rewards with."""

from __future__ import annotations

import torch
from accelerate.utils import reduce
from torch import Tensor


class LabelMeans:
    """Exponential averages of some figures by label, each over the pictures that had it.

    Sums and counts fade together: a batch without a label leaves its mean as it is, and a large batch counts more than
    a small one. A batch that is not finite is left out, as its step is skipped.

    Args:
        figures: how many.
        decay: share of the past that stays at each batch.

    Attributes:
        sums, counts: (2, figures) and (2, 1) float32, liked ones first.
    """

    def __init__(self, figures: int, decay: float, device: torch.device | str) -> None:
        self.decay = decay
        self.sums = torch.zeros(2, figures, device=device)
        self.counts = torch.zeros(2, 1, device=device)

    def update(self, values: Tensor, label: Tensor) -> None:
        """Take a batch in; called by all processes together, each with its own.

        Args:
            values: (figures, B).
            label: (B,), +1 or -1.
        """
        which = torch.stack([label > 0, label <= 0]).float()
        found = torch.cat([which @ values.detach().float().T, which.sum(dim=1, keepdim=True)], dim=1)
        found = reduce(found, reduction="sum")
        good = found.isfinite().all()
        for name, part in (("sums", found[:, :-1]), ("counts", found[:, -1:])):
            before = getattr(self, name)
            setattr(self, name, torch.where(good, self.decay * before + part, before))

    @property
    def means(self) -> Tensor:
        """(2, figures), liked ones first; 0 where nothing was seen."""
        return self.sums / self.counts.clamp(min=1e-12)

    def overall(self, figure: int) -> Tensor:
        """Mean of all pictures, a scalar."""
        return self.sums[:, figure].sum() / self.counts.sum().clamp(min=1e-12)

    def balanced(self, figure: int) -> Tensor:
        """Halfway between both labels' means, however many pictures each has; of one label alone, its mean."""
        seen = (self.counts[:, 0] > 0).float()
        return (self.means[:, figure] * seen).sum() / seen.sum().clamp(min=1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"labels.sums": self.sums, "labels.counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo ``state_dict``."""
        self.sums = state["labels.sums"].to(self.sums)
        self.counts = state["labels.counts"].to(self.counts)
