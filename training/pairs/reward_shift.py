"""The running mean of rewards that ``kto`` and ``bco_pair`` compare with: of all batches so far, of all processes."""

from __future__ import annotations

import torch
from accelerate.utils import reduce
from torch import Tensor


class RewardShift:
    """d_n = d_(n-1) + (mean of the batch's rewards - d_(n-1)) / n, over the micro-batches of a run.

    One batch says little: with a single pair its own mean makes BCO a loss on the difference alone. A batch whose mean
    is not finite is left out, as its step is skipped.

    Attributes:
        mean: scalar float32.
        count: scalar int64, batches in it.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.mean = torch.zeros((), device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, mean_reward: Tensor) -> Tensor:
        """The shift with this batch in it, a scalar; called by all processes together, each with its own batch's."""
        found = reduce(mean_reward.detach().float(), reduction="mean")
        good = found.isfinite()
        self.count = self.count + good
        moved = self.mean + (found - self.mean) / self.count.clamp(min=1)
        self.mean = torch.where(good, moved, self.mean)
        return self.mean

    def state_dict(self) -> dict[str, Tensor]:
        return {"shift.mean": self.mean, "shift.count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what ``state`` has of it; checkpoints of version 0.1 have nothing, and it begins anew."""
        if "shift.mean" in state:
            self.mean = state["shift.mean"].to(self.mean)
            self.count = state["shift.count"].to(self.count)
