"""Rounds: what was drawn, scored and paired, and the micro-batches that it lasts for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from diffusion_align.training.engine.protocols import RunInterrupted
from diffusion_align.training.engine.randomness import ITEMS, mix

from .pair_building import Counts

#: Rounds without a pair, one after the other, that stop a run.
MOST_EMPTY = 20


@dataclass(frozen=True)
class RoundFacts:
    """What is told of a round.

    Attributes:
        counts: what was left out.
        reward: mean of all pictures, before any is left out.
        gap: mean difference of the rewards of the pairs that are trained on.
        calls: rows of the denoiser that drawing took, of all processes.
    """

    counts: Counts
    pictures: int
    reward: float
    gap: float
    calls: float

    def metrics(self) -> dict[str, float]:
        """By the names of the log."""
        counts, pairs = self.counts, max(self.counts.pairs, 1)
        return {
            "reward": self.reward,
            "reward_gap": self.gap,
            "accepted": counts.accepted,
            "dropped/small_spread": counts.small_spread / counts.prompts,
            "dropped/small_gap": counts.small_gap / pairs,
            "dropped/near_duplicates": counts.near_duplicates / pairs,
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RoundFacts:
        return cls(**{**values, "counts": Counts(**values["counts"])})


@dataclass(frozen=True)
class Lists:
    """N lists of M own pictures of one prompt, the best ones first (pairs: M = 2); tensors lie on the CPU.

    Attributes:
        prompts: N.
        latents: (N, M, C, h, w) float32 of the finished pictures.
        reward: (N, M) float32.
        group: (N,) int64, a seed that all lists of a prompt share.
        mask: (N, M) bool, which pictures there are; None: all.
        inpaint: (N, 1 + C, h, w), mask and masked-image latents of inpainting models.
    """

    prompts: list[str]
    latents: Tensor
    reward: Tensor
    group: Tensor
    mask: Tensor | None = None
    inpaint: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: Tensor) -> Lists:
        """The lists ``rows``."""
        tensors = {name: tensor[rows] for name, tensor in self.tensors().items()}
        return Lists([self.prompts[row] for row in rows.tolist()], **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the prompts, by name."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Round:
    """The pairs or lists of all processes, the same in each of them."""

    lists: Lists
    facts: RoundFacts


@dataclass(frozen=True)
class ListItems:
    """What one micro-step trains on.

    Attributes:
        lists: B of them.
        column: (B,) int64, which of its noise levels each is trained at.
        number: of the round in the run.
        facts: of the round.
    """

    lists: Lists
    column: Tensor
    number: int
    facts: RoundFacts


class RoundStream:
    """Endless micro-batches of this process: a round is drawn when the last one is used up.

    All processes have all pairs of a round. Its items (pairs at noise levels) are gone through in an order that all
    share, and micro-batch k of all processes together holds the next B * W of them: W processes see what one process
    with the batch B * W sees. A round ends with an optimiser step, which is filled up with items of one more pass.

    Args:
        draw: makes the round of a number.
        columns: noise levels of each pair.
        batch_size: B.
        steps: micro-batches of an optimiser step.
        passes: how often a round is gone through, each time in another order.
    """

    def __init__(
        self,
        draw: Callable[[int], Round],
        columns: int,
        batch_size: int,
        steps: int,
        seed: int,
        passes: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.draw, self.columns, self.batch_size, self.steps, self.passes = draw, columns, batch_size, steps, passes
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.number, self.position = 0, 0
        self.round: Round | None = None

    def __iter__(self) -> Iterator[ListItems]:
        while True:
            if self.round is None:
                self.round = self.next_round()
            found, number = self.round, self.number
            items = self.items(len(found.lists))
            self.position += 1
            if self.position == self.length(len(found.lists)):
                self.number, self.position, self.round = number + 1, 0, None
            yield ListItems(found.lists.rows(items // self.columns), items % self.columns, number, found.facts)

    def next_round(self) -> Round:
        """The next one with pairs to train on.

        Raises:
            RunInterrupted: many in a row have none.
        """
        for _ in range(MOST_EMPTY):
            found = self.draw(self.number)
            if len(found.lists):
                return found
            self.number += 1
        counts = found.facts.counts
        raise RunInterrupted(
            f"{MOST_EMPTY} rounds in a row have no pair to train on; of the last one's {counts.prompts} prompts "
            f"{counts.small_spread} have a spread below min_spread; of the others' {counts.pairs} pairs "
            f"{counts.small_gap} have no gap above min_gap and {counts.near_duplicates} are nearer than min_distance"
        )

    def length(self, pairs: int) -> int:
        """Micro-batches of a round of so many pairs."""
        used = self.batch_size * self.world_size * self.steps
        return -(-pairs * self.columns * self.passes // used) * self.steps

    def items(self, pairs: int) -> Tensor:
        """The items of the present micro-batch, (B,) int64 in [0, pairs * columns)."""
        count = pairs * self.columns
        start = (self.position * self.world_size + self.rank) * self.batch_size
        places = torch.arange(start, start + self.batch_size)
        orders = {turn: self.order(turn, count) for turn in set((places // count).tolist())}
        return torch.stack([orders[place // count][place % count] for place in places.tolist()])

    def order(self, turn: int, count: int) -> Tensor:
        """The ``count`` items of the present round in the order of pass ``turn``."""
        shuffle = torch.Generator().manual_seed(mix(self.seed, ITEMS, self.number, turn))
        return torch.randperm(count, generator=shuffle)

    def state_dict(self) -> dict[str, Any]:
        """Position, and the round that is not used up."""
        state: dict[str, Any] = {"number": self.number, "position": self.position, "prompts": None}
        if self.round is not None:
            lists = self.round.lists
            state |= {"prompts": lists.prompts, "facts": self.round.facts.to_json()}
            state |= {f"round.{name}": tensor for name, tensor in lists.tensors().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.position, self.round = state["number"], state["position"], None
        if state["prompts"] is not None:
            tensors = {k.removeprefix("round."): v for k, v in state.items() if k.startswith("round.")}
            self.round = Round(Lists(state["prompts"], **tensors), RoundFacts.from_json(state["facts"]))
