"""Guidance away from a negative model: the null branch is predicted by one that was trained to be worse."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffusion_align.adapters.lora_stack import NEGATIVE

from .guider import StepGuidance


class ContrastiveGuidance(StepGuidance):
    """eps = eps_neg(null) + s (eps_pos(prompt) - eps_neg(null)): the null branch has the negative model's weights.

    Diffusion-NPO (2505.11245) trains it on exchanged preferences (``train dpo --swap-labels``), Self-NPO and Diff-SNPO
    otherwise. ``Adapter.load_negative`` loads it. The branches have different weights and share no batch: a step is two
    calls of the network, one after the other, and the LoRA's layers are switched between them.

    Args:
        guidance_scale: s; at 1 or less the null branch is not asked.
        stop: share of the steps, from the first one on, that are guided, as of ``ScheduleGuidance``.

    Raises:
        ValueError: ``stop`` outside of [0, 1]; in a run, no negative model was loaded.
    """

    @register_to_config
    def __init__(self, guidance_scale: float = 5.0, stop: float = 1.0) -> None:
        super().__init__(stop=stop)
        self.guidance_scale = guidance_scale
        self._layers: list[LoraLayer] = []
        self._active: list[Any] = []

    def reset(self) -> None:
        super().reset()
        self._layers = []

    def wants_null(self) -> bool:
        return self.guidance_scale > 1 and not self.stopped()

    def scale(self, pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
        return torch.full((len(pred_cond),), float(self.guidance_scale))

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Switch the negative model on, for the null branch."""
        super().prepare_models(denoiser)
        if self.is_conditional:
            return
        self._layers = self._layers or [layer for layer in denoiser.modules() if isinstance(layer, LoraLayer)]
        if not any(NEGATIVE in layer.lora_A or NEGATIVE in layer.lora_embedding_A for layer in self._layers):
            raise ValueError("contrastive guidance needs a negative model: load one with Adapter.load_negative(PATH)")
        # peft's own switch goes through every parameter, and sets which are trained.
        self._active = [layer._active_adapter for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter = [NEGATIVE]

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Switch back to the positive model."""
        super().cleanup_models(denoiser)
        for layer, active in zip(self._layers, self._active, strict=False):
            layer._active_adapter = active
        self._active = []
