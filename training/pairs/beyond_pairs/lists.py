"""DPO's relatives on ranked lists of pictures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data.types import PairBatch
from diffusion_align.objectives.list_stats import list_targets
from diffusion_align.objectives.one_signature import (
    LIST_LOSSES,
    best_of,
    check_name,
    list_metrics,
    list_preference_loss,
    mean_where,
)
from diffusion_align.training.engine.metrics import Metrics
from diffusion_align.training.engine.sourced_method import BatchSource

from ..compared import WATCHED, ComparedMethod
from ..config import DPOConfig
from ..noising import Noising
from ..reference import Reference


class ListMethod(ComparedMethod):
    """One forward pass of policy and reference for all pictures of all lists, one loss on each list.

    Pairs are lists of two. Arguments are those of ``PairMethod``.

    Raises:
        ValueError: a loss on lists that is not there.
    """

    config: DPOConfig

    def __init__(
        self,
        config: DPOConfig,
        adapter: Adapter,
        source: BatchSource[PairBatch],
        noising: Noising,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        reference: Reference | None = None,
    ) -> None:
        super().__init__(config, adapter, source, noising, autocast, reference, watch_frozen=config.watches_frozen)
        (self.loss_type,) = config.loss_types
        check_name(self.loss_type, LIST_LOSSES)
        self.advantage, self.options = config.list_options()

    def loss(self, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """Mean loss of the lists (scalar) and its metrics (scalar tensors on the device).

        Raises:
            ValueError: pairs with soft labels, of which the loss would see the order only.
        """
        seeds = batch.seeds
        pairs = batch.rank is None and len(batch.size_ids) == 2
        if pairs and self.advantage != "score" and bool(((batch.preference != 1) & (batch.preference != 0.5)).any()):
            raise ValueError(
                f"{batch.keys[0]}: loss_type {self.loss_type} sees the order of soft labels only: use lair or dgpo "
                "with list_advantage score, or a loss on pairs"
            )
        batch = batch.as_lists().to(self.adapter.device)
        found = self.measured(batch, seeds)
        targets = list_targets(batch.rank, batch.score, found.stats.present, self.advantage)
        beta = self.config.beta
        result = list_preference_loss(
            self.loss_type, found.stats, targets, beta=beta, sample_weight=found.weight, **self.options
        )
        loss = result.loss
        if self.config.sft_weight:
            best = best_of(targets.ranks(), found.stats.present)
            loss = loss + self.config.sft_weight * mean_where(found.stats.error, best)
        metrics = {"loss": loss.detach(), **result.metrics, **found.metrics}
        if found.frozen is not None:
            watched = list_metrics(found.frozen, targets.ranks(), beta)
            metrics |= {f"frozen/{name}": watched[name] for name in WATCHED}
        watching = self.watch.of_lists(found.t, found.from_base, targets.ranks(), beta, found.values)
        return loss, {**metrics, **watching}
