"""A reference that follows the policy: an average of its weights, or its weights of some steps ago."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.training.engine.sharding import shards
from diffusion_align.training.policy.held_weights import HeldWeights

from ..config import ReferencedConfig
from ..reference import NoisyPairs, ReferenceAnswer, answered


class MovingReference:
    """A second set of the trained tensors, which take the policy's place when the reference is asked.

    It starts as the policy does. After every optimiser step, ema: w_ref <- decay w_ref + (1 - decay) w (Linear-DPO,
    2605.21123); after every ``reference_sync_steps``-th, sync: w_ref <- alpha w + (1 - alpha) w_ref (TR-DPO,
    2404.09656). The step is noticed when the first batch of the next one asks.

    Raises:
        ValueError: the weights are cut over processes.
    """

    def __init__(self, config: ReferencedConfig, adapter: Adapter) -> None:
        if shards():
            raise ValueError(
                f"reference {config.reference} keeps whole weights, which FSDP cannot cut: launch it with DDP"
            )
        self.config, self.adapter, self.held = config, adapter, HeldWeights(adapter)
        #: Optimiser steps that have begun, and batches of the present one.
        self.begun, self.batches = 0, 0

    def answer(self, noisy: NoisyPairs, keys: Sequence[str], seeds: Tensor) -> ReferenceAnswer:
        if self.batches == 0:
            if self.begun:
                self._follow()
            self.begun += 1
        self.batches = (self.batches + 1) % self.config.gradient_accumulation_steps
        with self.held.in_place():
            return answered(noisy.output(self.adapter), noisy)

    def _follow(self) -> None:
        """Move after the optimiser step that has ended."""
        config = self.config
        if config.reference == "sync" and self.begun % config.reference_sync_steps:
            return
        share = 1 - config.reference_decay if config.reference == "ema" else config.reference_sync_alpha
        self.held.move(share)

    def checkpoint(self) -> None:
        """Its state is in the run's own checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        return {"reference_steps": self.begun, **self.held.state_dict("reference")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a step's end. What has no state of it begins from the policy as it is."""
        self.begun, self.batches = int(state.get("reference_steps", 0)), 0
        if "reference_steps" in state:
            self.held.load_state_dict(state, "reference")
        else:
            self.held = HeldWeights(self.adapter)
