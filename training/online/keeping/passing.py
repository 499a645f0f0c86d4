"""Pictures that every scorer likes."""

from __future__ import annotations

from torch import Tensor


def passes(members: Tensor, quantile: float | None) -> Tensor:
    """Which pictures are above every scorer's threshold, (P, K) bool.

    Args:
        members: (P, K, M), rewards of the K pictures of P prompts by M scorers.
        quantile: of a scorer's rewards of the prompt's pictures, at least which is asked for; None: more than their
            mean.
    """
    if quantile is None:
        return (members > members.mean(dim=1, keepdim=True)).all(dim=2)
    return (members >= members.quantile(quantile, dim=1, keepdim=True)).all(dim=2)
