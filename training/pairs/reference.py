"""The frozen reference's errors: for a whole batch, pair by pair, or remembered from an earlier visit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.objectives.errors import mse_per_sample

from .error_memory import ErrorMemory


def pair_rows(tensor: Tensor, index: int) -> Tensor:
    """Rows chosen and rejected (2, ...) of pair ``index`` in (2B, ...), laid out as without the others."""
    return tensor[index :: len(tensor) // 2].contiguous()


@dataclass(frozen=True)
class NoisyPairs:
    """What a denoiser is asked about B pairs, chosen first.

    Attributes:
        x_t, target: noisy latents and what the raw output should be, (2B, C, h, w).
        t: timesteps, (2B,).
        cond: 2B rows.
    """

    x_t: Tensor
    target: Tensor
    t: Tensor
    cond: Conditioning

    def pair(self, index: int) -> NoisyPairs:
        """Pair ``index`` alone, B = 1."""
        x_t, target, t = (pair_rows(part, index) for part in (self.x_t, self.target, self.t))
        return NoisyPairs(x_t, target, t, self.cond.map(lambda part: pair_rows(part, index)))

    def errors(self, adapter: Adapter) -> Tensor:
        """Mean squared error of each row, (2B,) float32, by the policy or inside ``adapter.reference()`` by that."""
        return mse_per_sample(adapter.predict(self.x_t, self.t, self.cond).output, self.target)


class Reference(Protocol):
    """Where the reference's errors come from."""

    def errors(self, noisy: NoisyPairs, keys: Sequence[str], seeds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Errors (2B,) float32 without graph, chosen first, and metrics.

        Args:
            keys: names of the pairs.
            seeds: theirs, (B,), a CPU tensor.
        """

    def checkpoint(self) -> None:
        """Keep what was learned; called by all processes together."""


class WholeBatch:
    """One forward pass for the batch: for noise that is fresh at every visit."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def errors(self, noisy: NoisyPairs, keys: Sequence[str], seeds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self.adapter.reference():
            return noisy.errors(self.adapter), {}

    def checkpoint(self) -> None:
        """It learns nothing."""


class PairByPair:
    """One forward pass for each pair: for fixed draws, whose errors can be remembered.

    The last bits of a forward pass depend on its batch size. A pair on its own meets the same shapes whatever batch,
    process or run it is visited in, so a remembered error equals a recomputed one, to the bit.

    Args:
        memory: None computes every error again.
    """

    def __init__(self, adapter: Adapter, memory: ErrorMemory | None = None) -> None:
        self.adapter, self.memory = adapter, memory

    def errors(self, noisy: NoisyPairs, keys: Sequence[str], seeds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.memory is None:
            return self._compute(noisy, list(range(len(keys)))).flatten(), {}
        slots = self.memory.slots(keys, seeds)
        unknown = [i for i, slot in enumerate(slots) if not self.memory.known[slot]]
        if unknown:
            self.memory.learn([slots[i] for i in unknown], self._compute(noisy, unknown))
        share = torch.full((), 1 - len(unknown) / len(keys), device=noisy.t.device)
        return self.memory.recall(slots).flatten(), {"reference_hits": share}

    def _compute(self, noisy: NoisyPairs, pairs: list[int]) -> Tensor:
        """Errors of ``pairs``, (2, n): chosen and rejected."""
        with self.adapter.reference():
            return torch.stack([noisy.pair(i).errors(self.adapter) for i in pairs], dim=1)

    def checkpoint(self) -> None:
        if self.memory is not None:
            self.memory.save()
