"""How far the gradients of the chosen and the rejected error are one and the same (2410.13828)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffusion_align.training.engine.metrics import Metrics, WeightedMean

#: Half-precision gradients of a mean error underflow; cosine and kappa do not change with its size.
SCALE = 1024.0


def entanglement(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Of two gradients (n,): what they have in common.

    Returns:
        ``cosine`` of the angle between them; ``kappa`` = <g_w, g_l> / |g_w|^2: above 1, a step along -(g_w - g_l)
        raises the chosen error; ``kappa_rejected`` = <g_w, g_l> / |g_l|^2: above 1, it lowers the rejected one.
    """
    common, ours, theirs = chosen @ rejected, chosen @ chosen, rejected @ rejected
    return {
        "cosine": common / (ours * theirs).sqrt(),
        "kappa": common / ours,
        "kappa_rejected": common / theirs,
    }


class EntanglementProbe:
    """Takes both gradients apart at every ``every``-th micro-step, with one more pass backward.

    Args:
        parameters: that are trained; asked when they are needed.
        every: 0 never does.
    """

    def __init__(self, parameters: Callable[[], Sequence[nn.Parameter]], every: int) -> None:
        self.parameters, self.every, self.calls = parameters, every, 0

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Metrics:
        """``entanglement/cosine``, ``/kappa`` and ``/kappa_rejected``, or nothing in between.

        Args:
            chosen, rejected: errors (B,) with a graph, which is kept.
        """
        if not self.every:
            return {}
        self.calls += 1
        if (self.calls - 1) % self.every:
            return {}
        gradients = [self._gradient(error) for error in (chosen, rejected)]
        one = torch.ones((), device=chosen.device)
        found = entanglement(*gradients)
        return {f"entanglement/{name}": WeightedMean(value, one) for name, value in found.items()}

    def _gradient(self, errors: Tensor) -> Tensor:
        parameters = self.parameters()
        parts = torch.autograd.grad(SCALE * errors.mean(), parameters, retain_graph=True, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(parameter) if part is None else part).flatten().float() / SCALE
                for part, parameter in zip(parts, parameters, strict=True)
            ]
        )

    def state_dict(self) -> dict[str, int]:
        return {"entanglement_calls": self.calls} if self.every else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Undo ``state_dict``; a run that did not measure before begins to count."""
        self.calls = state.get("entanglement_calls", 0)
