"""What the policy is compared with: the base, an average of past policies, or a copy of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusion_align.adapters import Adapter
from diffusion_align.training.policy.held_weights import HeldWeights

from .config import OnlineDPOConfig
from .momentum import build_momentum


class RoundReference:
    """The reference of the settings.

    Attributes:
        held: its weights; None is the base.
        momentum: moves the policy on between rounds; None: nothing does.
    """

    def __init__(self, config: OnlineDPOConfig, adapter: Adapter) -> None:
        self.config, self.adapter = config, adapter
        self.held = HeldWeights(adapter) if config.follows else None
        self.momentum = build_momentum(adapter, config.nesterov) if config.nesterov else None
        self.step, self.round = 0, 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the adapter is the reference and builds no graph."""
        with self.adapter.reference() if self.held is None else self.held.in_place():
            yield

    def after_step(self, step: int) -> None:
        """Move on: ``step`` optimiser steps are done. Asked again for the same one, nothing happens."""
        if step <= self.step:
            return
        self.step, config = step, self.config
        if self.held is None:
            return
        if config.reference == "ema":
            self.held.move(1 - config.reference_decay)
        elif config.reference_sync_steps is not None and step % config.reference_sync_steps == 0:
            self.held.move(config.reference_sync_alpha)

    def before_round(self, number: int) -> None:
        """Move on: round ``number`` is about to be drawn. Asked again for the same one, nothing happens.

        With ``nesterov`` the policy moves on first.
        """
        if number <= self.round:
            return
        self.round, config = number, self.config
        if self.momentum is not None:
            self.momentum.extrapolate()
        if self.held is not None and config.reference == "sync" and config.reference_sync_steps is None:
            self.held.move(config.reference_sync_alpha)

    def state_dict(self) -> dict[str, Any]:
        held = {} if self.held is None else self.held.state_dict("reference")
        gained = {} if self.momentum is None else self.momentum.state_dict()
        return {"reference_step": self.step, "reference_round": self.round, **held, **gained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.round = state["reference_step"], state["reference_round"]
        if self.held is not None:
            self.held.load_state_dict(state, "reference")
        if self.momentum is not None:
            self.momentum.load_state_dict(state)
