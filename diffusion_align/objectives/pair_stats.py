"""What every preference loss takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PairStats:
    """Mean squared prediction errors of a batch of pairs, each (B,) float32.

    The error e of a sample stands for its negative log-likelihood (2311.12908, eq. 14), so the advantage of the policy
    over the reference is s = e_ref - e: positive where the policy predicts the sample better.

    Attributes:
        chosen, rejected: errors of the policy, with a graph.
        ref_chosen, ref_rejected: errors of the reference; both None for reference-free losses.
        moved: m = mean (output - reference's output)^2, (2, B) float32 without graph, chosen first; None where the
            reference's outputs are not there, e.g. remembered errors.
        overlap: q = mean d_w d_l of d = output - target, (B,) float32 without graph.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    moved: Tensor | None = None
    overlap: Tensor | None = None

    @property
    def has_reference(self) -> bool:
        return self.ref_chosen is not None and self.ref_rejected is not None

    @property
    def s_w(self) -> Tensor:
        """Advantage on the chosen images, (B,)."""
        return _advantage(self.ref_chosen, self.chosen)

    @property
    def s_l(self) -> Tensor:
        """Advantage on the rejected images, (B,)."""
        return _advantage(self.ref_rejected, self.rejected)


@dataclass(frozen=True)
class LossOutput:
    """A loss and what it was made of.

    Attributes:
        loss: scalar with a graph.
        per_sample: loss of each pair before weighting, (B,).
        metrics: detached scalars that stay on the device.
    """

    loss: Tensor
    per_sample: Tensor
    metrics: dict[str, Tensor]


def _advantage(reference: Tensor | None, policy: Tensor) -> Tensor:
    if reference is None:
        raise ValueError("this loss compares with a reference: PairStats needs ref_chosen and ref_rejected")
    return reference - policy
