"""The reward that a run learns from: watched, and what it remembers is a part of the run's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from diffusion_align.data.holes import Holes
from diffusion_align.rewards import RewardOutput, RewardScorer
from diffusion_align.rewards.watched import ScorerError, WatchedScorer
from diffusion_align.training.engine.protocols import RunInterrupted

OutputT = TypeVar("OutputT")


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


class InTurn(Generic[OutputT]):
    """Batches of pictures, judged one after the other as they came: when all are there, or while more are drawn.

    Args:
        judge: (positions, pictures) to an output.
        meanwhile: judge in a thread of its own from the first batch on, for a judge that takes nothing from drawing.
    """

    def __init__(self, judge: Callable[[range, Tensor], OutputT], meanwhile: bool) -> None:
        self.judge, self.pool = judge, ThreadPoolExecutor(1) if meanwhile else None
        self.waiting: list[tuple[range, Tensor]] = []
        self.asked: list[Future[OutputT]] = []

    def __enter__(self) -> InTurn[OutputT]:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)  # one that failed makes those after it worthless

    def take(self, rows: range, pictures: Tensor) -> None:
        """One more batch."""
        if self.pool is None:
            self.waiting.append((rows, pictures))
        else:
            self.asked.append(self.pool.submit(self.judge, rows, pictures))

    def outputs(self) -> list[OutputT]:
        """Of all batches; raises what ``judge`` raised."""
        return [future.result() for future in self.asked] + [self.judge(*batch) for batch in self.waiting]
