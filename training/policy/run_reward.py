"""The reward that a run learns from, watched, and the rewards so far: what both remember is in the run's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
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


class RewardHistory:
    """The last rewards of every prompt: the baseline of DDPO (2305.13301).

    Args:
        size: rewards remembered of a prompt; older ones are forgotten.
        enough: a prompt with fewer is compared with all pictures of the rollout instead.

    Attributes:
        rewards: by prompt, oldest first.
    """

    def __init__(self, size: int, enough: int) -> None:
        self.size, self.enough = size, enough
        self.rewards: dict[str, list[float]] = {}

    def add(self, prompts: Sequence[str], rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Remember ``rewards`` (P, G), the G pictures of each of P prompts, and look back on them and those before.

        Returns:
            Mean and standard deviation of what is remembered of each prompt, each (P,) float32.
        """
        for prompt, found in zip(prompts, rewards.tolist(), strict=True):
            self.rewards[prompt] = [*self.rewards.get(prompt, []), *found][-self.size :]
        past = [torch.tensor(self.rewards[prompt]) for prompt in prompts]
        seen = [own if len(own) >= self.enough else rewards.float().flatten() for own in past]
        return torch.stack([each.mean() for each in seen]), torch.stack([each.std(correction=0) for each in seen])

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(found) for prompt, found in self.rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.rewards = {prompt: list(found) for prompt, found in state.items()}
