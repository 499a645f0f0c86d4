"""The preference-pair step shared by DPO and InPO, which differ in where the noise comes from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data.types import PairBatch
from diffusion_align.devices import send
from diffusion_align.objectives.preference import (
    PREFERENCE_LOSSES,
    check_losses,
    mean_reward,
    pair_metrics,
    preference_loss,
)
from diffusion_align.training.engine.metrics import Metrics
from diffusion_align.training.engine.sourced_method import BatchSource
from diffusion_align.training.policy.watching.entanglement import EntanglementProbe

from .compared import WATCHED, ComparedMethod
from .config import DPOConfig
from .noising import Noising
from .reference import Reference
from .reward_shift import RewardShift
from .switches.per_pair import pair_changes, pair_strength


class PairMethod(ComparedMethod):
    """One fused policy forward for chosen and rejected, one reference forward, one preference loss.

    Args:
        source: the pairs.
        noising: Gaussian noise (DPO) or DDIM inversion (InPO).
        autocast: context of the forward passes.
        reference: where the reference's errors come from; None computes them batch by batch.

    Raises:
        ValueError: losses that cannot be added up, or that compare pairs where a batch has one.
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
        check_losses(config.loss_types, config.loss_weights or None)
        losses = {name: PREFERENCE_LOSSES[name] for name in config.loss_types}
        ranking = [name for name, loss in losses.items() if loss.across_batch]
        if ranking and config.per_device_train_batch_size == 1:
            raise ValueError(
                f"loss_type {ranking[0]} compares the pairs of a batch, and per_device_train_batch_size = 1 gives it "
                "one (gradient_accumulation_steps does not help): expected at least 2"
            )
        super().__init__(
            config,
            adapter,
            source,
            noising,
            autocast,
            reference,
            needs_reference=config.needs_reference,
            watch_frozen=config.watches_frozen,
        )
        self.shift = RewardShift(adapter.device) if any(loss.shift for loss in losses.values()) else None
        self.entanglement = EntanglementProbe(
            lambda: list(adapter.trainable_parameters().values()),
            config.entanglement_steps * config.gradient_accumulation_steps,
        )

    def loss(self, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """Mean preference loss of the batch (scalar) and its metrics, which stay on the device."""
        config, device = self.config, self.adapter.device
        seeds = batch.seeds  # read on the host, before the move: asking a device for them would stall it
        strength = pair_strength(config, batch, device)
        soft_labels = None
        if strength.uses_labels and bool((batch.preference != 1).any()):
            soft_labels = send(batch.preference, device)
        changes = pair_changes(config, batch, device)
        batch = batch.to(device)
        found = self.measured(batch, seeds)
        stats = changes.exchanged(found.stats.as_pairs())
        result = preference_loss(
            config.loss_types,
            changes.weakened(stats),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            soft_labels=soft_labels,
            sample_weight=found.weight,
            shift=None if self.shift is None else self.shift.update(mean_reward(stats, config.beta)),
            loss_weights=config.loss_weights or None,
            target=strength.target,
            eta=config.linear_eta,
            pair_beta=strength.pair_beta,
        )
        loss = result.loss
        if config.sft_weight:
            loss = loss + config.sft_weight * stats.chosen.mean()
        metrics = {"loss": loss.detach(), **result.metrics, **found.metrics}
        # How far the policy is from where it began, also where it is compared with something nearer.
        from_base = stats if found.frozen is None else changes.exchanged(found.frozen.as_pairs())
        if found.frozen is not None:
            watched = pair_metrics(from_base, config.beta)
            metrics |= {f"frozen/{name}": watched[name] for name in WATCHED}
        watching = self.watch(found.t, from_base, config.beta, found.values)
        return loss, {**metrics, **watching, **self.entanglement(stats.chosen, stats.rejected)}

    def state_dict(self) -> dict[str, Any]:
        shift = {} if self.shift is None else self.shift.state_dict()
        return super().state_dict() | shift | self.entanglement.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.entanglement.load_state_dict(state)
        if self.shift is not None:
            self.shift.load_state_dict(state)
