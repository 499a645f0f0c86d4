"""A second set of the trained weights, which takes the first one's place for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter


class HeldWeights:
    """Weights of an earlier policy; at first the present one's.

    Attributes:
        tensors: by the names of ``Adapter.trainable_parameters``.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.tensors = {name: p.detach().clone() for name, p in adapter.trainable_parameters().items()}

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Go ``share`` of the way to the present policy; matrices of a LoRA each for itself."""
        for name, parameter in self.adapter.trainable_parameters().items():
            self.tensors[name].lerp_(parameter, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the adapter has these weights and builds no graph."""
        own = self.adapter.trainable_parameters()
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in own.items()}
            try:
                self._put(self.tensors)
                yield
            finally:
                self._put(kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the adapter these weights for good."""
        self._put(self.tensors)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.adapter.trainable_parameters().items():
            parameter.copy_(tensors[name])
        torch.clear_autocast_cache()  # it has casts of weights by their names, not by their values

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """By ``prefix`` and name."""
        return {f"{prefix}.{name}": tensor for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state[f"{prefix}.{name}"])
