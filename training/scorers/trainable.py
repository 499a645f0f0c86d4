"""A scorer as the loop wants it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from diffusion_align.rewards import RewardScorer


class TrainableScorer:
    """A scorer as the loop wants it."""

    def __init__(self, scorer: RewardScorer) -> None:
        self.scorer = scorer
        self.module: nn.Module = scorer

    @property
    def network(self) -> nn.Module:
        return self.scorer

    @property
    def shardable(self) -> tuple[nn.Module, ...]:
        return ()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.scorer.named_parameters() if p.requires_grad}

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
        self.module = wrapper(self.module)
        return self.module

    def save(self, folder: Path) -> Path:
        return self.scorer.save_pretrained(folder / "scorer")  # type: ignore[operator]
