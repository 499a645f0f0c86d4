"""Nesterov's step between rounds: the next one starts further on than where the last one ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.adapters.lora_files import Lora, LowRank, combined
from diffusion_align.adapters.lora_names import Address
from diffusion_align.training.policy.held_weights import HeldWeights


class Momentum(Protocol):
    """What a policy gains between rounds: w <- w + alpha (w - w_before), the policy before the last round.

    APO (2410.06293) multiplies densities, pi_t (pi_t / pi_(t-1))^alpha: scores add up, and so, to first order, do
    weights.
    """

    def extrapolate(self) -> None:
        """Go on from the present policy."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def build_momentum(adapter: Adapter, alpha: float) -> Momentum:
    """For a LoRA or for all weights, whichever ``adapter`` trains."""
    return LoraMomentum(adapter, alpha) if adapter.is_lora else WeightMomentum(adapter, alpha)


class WeightMomentum:
    """For a policy all of whose weights are trained."""

    def __init__(self, adapter: Adapter, alpha: float) -> None:
        self.adapter, self.alpha, self.before = adapter, alpha, HeldWeights(adapter)

    @torch.no_grad()
    def extrapolate(self) -> None:
        for name, parameter in self.adapter.trainable_parameters().items():
            now = parameter.clone()
            parameter.add_(now - self.before.tensors[name], alpha=self.alpha)
            self.before.tensors[name] = now

    def state_dict(self) -> dict[str, Any]:
        return self.before.state_dict("momentum")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.before.load_state_dict(state, "momentum")


class LoraMomentum:
    """For a LoRA: what it adds (up @ down) is extrapolated, which its two matrices, each for itself, would not be.

    The matrices stay what they are, and the optimiser's moments fit them. What is gained becomes a second, frozen LoRA
    beside them, of as many ranks as it takes; files hold both as one.

    Attributes:
        gained: that LoRA.
        before: what both added together before the last round.
    """

    def __init__(self, adapter: Adapter, alpha: float) -> None:
        self.adapter, self.alpha = adapter, alpha
        self.gained: Lora = {}
        self.before: Lora = {}

    def extrapolate(self) -> None:
        now = {address: layer.copied() for address, layer in self.adapter.loras.attached().items()}
        parts = [self.gained, scaled(now, self.alpha), scaled(self.before, -self.alpha)]
        self.gained, self.before = {a: compressed(layer) for a, layer in combined(parts).items()}, now
        self.adapter.loras.put_beside(self.gained)

    def state_dict(self) -> dict[str, Any]:
        return as_tensors(self.gained, "momentum.gained") | as_tensors(self.before, "momentum.before")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gained, self.before = (as_lora(state, name) for name in ("momentum.gained", "momentum.before"))
        self.adapter.loras.put_beside(self.gained)


def scaled(lora: Lora, factor: float) -> Lora:
    """``factor`` times what ``lora`` adds."""
    return {address: layer.scaled(factor) for address, layer in lora.items()}


def compressed(layer: LowRank, tolerance: float = 1e-7) -> LowRank:
    """The same sum in as few ranks as it has: singular values below ``tolerance`` of the largest are rounding."""
    up, down = layer.up.flatten(1).double(), layer.down.flatten(1).double()
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    rank = max(int((values > tolerance * values[0]).sum()), 1)
    root = values[:rank].sqrt()
    new_up, new_down = (q_up @ left[:, :rank]) * root, root[:, None] * (right[:rank] @ q_down.T)
    return LowRank(
        new_down.float().reshape(rank, *layer.down.shape[1:]), new_up.float().reshape(-1, rank, *layer.up.shape[2:])
    )


def as_tensors(lora: Lora, prefix: str) -> dict[str, Tensor]:
    """Matrices by ``prefix``, kind, part and module."""
    return {
        f"{prefix}:{kind}:{address.part}:{address.module}": matrix
        for address, layer in lora.items()
        for kind, matrix in (("down", layer.down), ("up", layer.up))
    }


def as_lora(state: Mapping[str, Any], prefix: str) -> Lora:
    """Undo ``as_tensors``."""
    found: dict[Address, dict[str, Tensor]] = {}
    for name, matrix in state.items():
        if name.startswith(prefix + ":"):
            _, kind, part, module = name.split(":")
            found.setdefault(Address(part, module), {})[kind] = matrix
    return {address: LowRank(**matrices) for address, matrices in found.items()}
