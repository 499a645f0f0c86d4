"""How the two aspects of an edit become one reward."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

ASPECTS = ("instruction_following", "visual_quality")


Fusion = Literal["mean", "min", "sum"]


def fuse(means: Tensor, stds: Tensor, how: Fusion) -> tuple[Tensor, Tensor]:
    """Reward and its spread (B,) of the heads' (H, B), taken as independent."""
    if how == "min":
        least = means.argmin(dim=0, keepdim=True)
        return means.gather(0, least)[0], stds.gather(0, least)[0]
    total, spread = means.sum(dim=0), stds.square().sum(dim=0).sqrt()
    return (total, spread) if how == "sum" else (total / len(means), spread / len(means))
