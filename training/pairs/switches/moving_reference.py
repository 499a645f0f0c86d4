"""A reference that follows the policy: an average of its weights, or its weights of some steps ago."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.training.engine.sharding import shards

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
        self.config, self.adapter = config, adapter
        self.weights = {name: p.detach().clone() for name, p in adapter.trainable_parameters().items()}
        #: Optimiser steps that have begun, and batches of the present one.
        self.begun, self.batches = 0, 0

    def answer(self, noisy: NoisyPairs, keys: Sequence[str], seeds: Tensor) -> ReferenceAnswer:
        if self.batches == 0:
            if self.begun:
                self._follow()
            self.begun += 1
        self.batches = (self.batches + 1) % self.config.gradient_accumulation_steps
        with self.in_place():
            return answered(noisy.output(self.adapter), noisy)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move after the optimiser step that has ended."""
        config = self.config
        if config.reference == "sync" and self.begun % config.reference_sync_steps:
            return
        share = 1 - config.reference_decay if config.reference == "ema" else config.reference_sync_alpha
        for name, parameter in self.adapter.trainable_parameters().items():
            self.weights[name].lerp_(parameter, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the adapter has the reference's weights, and builds no graph.

        A policy's graph must not be waiting for its backward pass: its weights are written over, and put back.
        """
        own = self.adapter.trainable_parameters()
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in own.items()}
            for name, parameter in own.items():
                parameter.copy_(self.weights[name])
            try:
                yield
            finally:
                for name, parameter in own.items():
                    parameter.copy_(kept[name])

    def checkpoint(self) -> None:
        """Its state is in the run's own checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        return {"reference_steps": self.begun, **{f"reference.{name}": w for name, w in self.weights.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a step's end. What has no state of it begins from the policy as it is."""
        self.begun, self.batches = int(state.get("reference_steps", 0)), 0
        with torch.no_grad():
            for name, parameter in self.adapter.trainable_parameters().items():
                self.weights[name].copy_(state.get(f"reference.{name}", parameter))
