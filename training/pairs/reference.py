"""The frozen reference's answers: for a whole batch, pair by pair, or errors remembered from an earlier visit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.objectives.errors import mse_per_sample

from .error_memory import ErrorMemory


def pair_rows(tensor: Tensor, index: int, count: int) -> Tensor:
    """Rows (K, ...) of example ``index`` of ``count`` in (K count, ...), laid out as without the others.

    Of a pair these are chosen and rejected.
    """
    return tensor[index::count].contiguous()


@dataclass(frozen=True)
class NoisyPairs:
    """What a denoiser is asked about B pairs, chosen first; or about B examples of K pictures, K B rows.

    Attributes:
        x_t, target: noisy latents and what the raw output should be, (K B, C, h, w).
        t: timesteps, (K B,).
        cond: K B rows.
    """

    x_t: Tensor
    target: Tensor
    t: Tensor
    cond: Conditioning

    def pair(self, index: int, count: int) -> NoisyPairs:
        """Pair ``index`` of ``count`` alone, B = 1."""
        x_t, target, t = (pair_rows(part, index, count) for part in (self.x_t, self.target, self.t))
        return NoisyPairs(x_t, target, t, self.cond.map(lambda part: pair_rows(part, index, count)))

    def output(self, adapter: Adapter) -> Tensor:
        """Raw outputs (K B, C, h, w) float32 by the policy or inside ``adapter.reference()`` by that."""
        return adapter.predict(self.x_t, self.t, self.cond).output

    def errors(self, adapter: Adapter) -> Tensor:
        """Mean squared error of each row, (K B,) float32, by the policy or inside ``adapter.reference()`` by that."""
        return mse_per_sample(self.output(adapter), self.target)


@dataclass(frozen=True)
class ReferenceAnswer:
    """What a reference says of a batch, without graph.

    Attributes:
        errors: (K B,) float32, chosen first.
        output: raw outputs (K B, C, h, w); None where errors were remembered.
        metrics: scalars on the device.
    """

    errors: Tensor
    output: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


def answered(output: Tensor, noisy: NoisyPairs) -> ReferenceAnswer:
    """The answer that an output is."""
    return ReferenceAnswer(mse_per_sample(output, noisy.target), output)


class Reference(Protocol):
    """Where the reference's errors come from.

    It is asked once for every batch, before the policy predicts.
    """

    def answer(self, noisy: NoisyPairs, keys: Sequence[str], seeds: Tensor) -> ReferenceAnswer:
        """What the reference says of a batch.

        Args:
            keys: names of the examples.
            seeds: theirs, (B,), a CPU tensor.
        """

    def checkpoint(self) -> None:
        """Keep what was learned; called by all processes together."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors for the run's checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo ``state_dict``."""


class WholeBatch:
    """One forward pass for the batch: for noise that is fresh at every visit."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def answer(self, noisy: NoisyPairs, keys: Sequence[str], seeds: Tensor) -> ReferenceAnswer:
        with self.adapter.reference():
            return answered(noisy.output(self.adapter), noisy)

    def checkpoint(self) -> None:
        """It learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It has no state."""


class PairByPair:
    """One forward pass for each pair: for fixed draws, whose errors can be remembered.

    The last bits of a forward pass depend on its batch size. A pair on its own meets the same shapes whatever batch,
    process or run it is visited in, so a remembered error equals a recomputed one, to the bit.

    Args:
        memory: None computes every error again.
    """

    def __init__(self, adapter: Adapter, memory: ErrorMemory | None = None) -> None:
        self.adapter, self.memory = adapter, memory

    def answer(self, noisy: NoisyPairs, keys: Sequence[str], seeds: Tensor) -> ReferenceAnswer:
        if self.memory is None:
            alone = self._compute(noisy, list(range(len(keys))), len(keys))
            outputs = torch.stack([each.output for each in alone if each.output is not None], dim=1).flatten(0, 1)
            return ReferenceAnswer(_errors(alone).flatten(), outputs)
        slots = self.memory.slots(keys, seeds)
        unknown = [i for i, slot in enumerate(slots) if not self.memory.known[slot]]
        if unknown:
            self.memory.learn([slots[i] for i in unknown], _errors(self._compute(noisy, unknown, len(keys))))
        share = torch.full((), 1 - len(unknown) / len(keys), device=noisy.t.device)
        return ReferenceAnswer(self.memory.recall(slots).flatten(), None, {"reference_hits": share})

    def _compute(self, noisy: NoisyPairs, pairs: list[int], count: int) -> list[ReferenceAnswer]:
        """Of each of some ``pairs`` of ``count`` chosen and rejected."""
        alone = [noisy.pair(index, count) for index in pairs]
        with self.adapter.reference():
            return [answered(pair.output(self.adapter), pair) for pair in alone]

    def checkpoint(self) -> None:
        if self.memory is not None:
            self.memory.save()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What it learned has a file of its own."""


def _errors(alone: Sequence[ReferenceAnswer]) -> Tensor:
    """Errors of pairs that were asked about alone, (2, n): chosen and rejected."""
    return torch.stack([each.errors for each in alone], dim=1)
