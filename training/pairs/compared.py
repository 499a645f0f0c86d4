"""Comparing the policy's errors with a reference's: what the methods on pairs, lists and labelled pictures share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data.types import PairBatch
from diffusion_align.objectives.errors import mse_per_sample
from diffusion_align.objectives.list_stats import ListStats
from diffusion_align.training.engine.sourced_method import BatchSource
from diffusion_align.training.policy.watching.pair_watch import PairWatch
from diffusion_align.training.policy.watching.timestep_bins import TimestepBins

from .config import DenoisingConfig
from .denoising import DenoisingMethod
from .noising import Noising
from .reference import NoisyPairs, Reference, ReferenceAnswer, WholeBatch
from .switches.timesteps import level_weight

#: What the frozen reference is asked for where another one is compared with.
WATCHED = ("margin", "chosen_error_up", "moved")


@dataclass(frozen=True)
class Measured:
    """A batch as the losses take it.

    Attributes:
        stats: of policy and reference.
        frozen: the same with the frozen reference, where another one is compared with and this one is watched.
        t: timesteps of the examples, (B,).
        weight: factors of the examples' losses, (B,).
        metrics: of the reference.
        values: C h w of a latent.
    """

    stats: ListStats
    frozen: ListStats | None
    t: Tensor
    weight: Tensor
    metrics: dict[str, Tensor]
    values: int

    @property
    def from_base(self) -> ListStats:
        """How far the policy is from where it began, also where it is compared with something nearer."""
        return self.stats if self.frozen is None else self.frozen


class ComparedMethod(DenoisingMethod):
    """One forward pass of the reference and one of the policy for all pictures of a batch.

    Args:
        source: the examples.
        noising: Gaussian noise, or DDIM inversion.
        autocast: context of the forward passes.
        reference: where the reference's errors come from; None computes them batch by batch.
        needs_reference: whether it is asked at all.
        watch_frozen: also ask the frozen reference, because ``reference`` moves.
    """

    def __init__(
        self,
        config: DenoisingConfig,
        adapter: Adapter,
        source: BatchSource[PairBatch],
        noising: Noising,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        reference: Reference | None = None,
        *,
        needs_reference: bool = True,
        watch_frozen: bool = False,
    ) -> None:
        super().__init__(config, adapter, source, noising, autocast)
        self.reference, self.needs_reference = reference or WholeBatch(adapter), needs_reference
        self.frozen = WholeBatch(adapter) if watch_frozen else None
        self.watch = PairWatch(self.path, TimestepBins(config.timestep_bins, self.path.num_timesteps))

    def measured(self, batch: PairBatch, seeds: Tensor) -> Measured:
        """Statistics of a batch, which is on the device, with ``seeds`` (B,), which are not."""
        noisy = self.noisy(batch, seeds)
        answer = frozen = None
        if self.needs_reference:
            # Each forward pass has a context of its own: autocast keeps half-precision copies of weights until the
            # context's end, and a moving reference's are not the policy's.
            with self.autocast():
                answer = self.reference.answer(noisy, batch.keys, seeds)
            if self.frozen is not None:
                with self.autocast():
                    frozen = self.frozen.answer(noisy, batch.keys, seeds)
        with self.autocast():
            output = noisy.output(self.adapter)
            stats = statistics(output, noisy, answer, len(batch), batch.mask)
        watched = None
        if frozen is not None:
            count = len(batch)
            watched = replace(stats, reference=_columns(frozen.errors, count), moved=moved(output, frozen, count))
        t = noisy.t[: len(batch)]
        level = level_weight(self.config, self.path, t)
        weight = batch.weight if level is None else batch.weight * level
        metrics = {} if answer is None else answer.metrics
        return Measured(stats, watched, t, weight, metrics, noisy.x_t[0].numel())

    def state_dict(self) -> dict[str, Any]:
        self.reference.checkpoint()
        return super().state_dict() | self.reference.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.reference.load_state_dict(state)


def statistics(
    output: Tensor, noisy: NoisyPairs, answer: ReferenceAnswer | None, examples: int, mask: Tensor | None = None
) -> ListStats:
    """Statistics of examples with K pictures each, from raw outputs (K B, C, h, w).

    Args:
        answer: the reference's; None: there is none.
        mask: (B, K) bool, which pictures there are.
    """
    error = _columns(mse_per_sample(output, noisy.target), examples)
    overlap = None
    if error.shape[1] == 2:  # of lists nobody asks for it
        with torch.no_grad():
            off = (output.float() - noisy.target.float()).unflatten(0, (-1, examples))
            overlap = (off[:1] * off).flatten(2).mean(dim=2).T
    if answer is None:
        return ListStats(error, None, mask, None, overlap)
    return ListStats(error, _columns(answer.errors, examples), mask, moved(output, answer, examples), overlap)


def moved(output: Tensor, answer: ReferenceAnswer, examples: int) -> Tensor | None:
    """m = mean (output - reference's output)^2, (B, K) float32 without graph; None where errors were remembered."""
    return None if answer.output is None else _columns(mse_per_sample(output.detach(), answer.output), examples)


def _columns(rows: Tensor, examples: int) -> Tensor:
    """Numbers of K B rows as (B, K)."""
    return rows.view(-1, examples).T
