"""The reward that a run learns from: watched, and what it remembers is a part of the run's state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_align.data.holes import Holes
from diffusion_align.rewards import RewardOutput, RewardScorer
from diffusion_align.rewards.watched import ScorerError, WatchedScorer
from diffusion_align.training.engine.protocols import RunInterrupted


class RewardFailed(RunInterrupted, ScorerError):
    """The scorer failed; the message names it and the batch."""


class RunReward:
    """A scorer with a time limit, whose running statistics (of an ensemble) are saved with the run.

    Args:
        timeout: seconds for one batch.
        folder: where the batch goes that the scorer fails on.
    """

    def __init__(self, scorer: RewardScorer, timeout: float, folder: Path) -> None:
        self.scorer = scorer
        self.watched = WatchedScorer(scorer, timeout, folder)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], holes: Holes | None = None, with_graph: bool = False
    ) -> RewardOutput:
        """Scores of ``images`` (B, 3, H, W), as ``WatchedScorer`` gives them.

        Raises:
            RewardFailed: the scorer raised, gave numbers that are not finite, or took too long.
        """
        try:
            return self.watched(images, prompts, holes, with_graph)
        except ScorerError as error:
            raise RewardFailed(str(error)) from error

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the running statistics, by "scorer.NAME"."""
        buffers = self.scorer.named_buffers()
        return {f"scorer.{name}": value.detach().clone() for name, value in buffers if "standardisers." in name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` has of them."""
        buffers = dict(self.scorer.named_buffers())
        for name, value in state.items():
            if name.startswith("scorer."):
                buffers[name.removeprefix("scorer.")].copy_(value)
