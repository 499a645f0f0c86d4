"""EGPO (2503.08942): a half step shows what the opponents will be; the whole step is taken from where it began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.training.online.rollout import Rollout
from diffusion_align.training.policy.held_weights import HeldWeights


def beats(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """P(picture k beats picture j), (P, K, J): the scorers' mean sigmoid((r_k - r_j) / temperature).

    At a small temperature each scorer has a vote. Votes need not be transitive: a may beat b, b beat c, and c beat a.

    Args:
        first, second: (P, K, M) and (P, J, M), rewards of the pictures of P prompts by M scorers.
    """
    return torch.sigmoid((first[:, :, None] - second[:, None]) / temperature).mean(dim=3)


def wins_among(members: Tensor, temperature: float) -> Tensor:
    """Mean probability of each picture to beat another one of its prompt, (P, K); ``members`` (P, K, M)."""
    found = beats(members, members, temperature)
    others = members.shape[1] - 1
    return (found.sum(dim=2) - found.diagonal(dim1=1, dim2=2)) / others


class Extragradient:
    """Two rounds for one step of the policy w_t, whose pictures y both of them train on.

    In an even round the opponents are the pictures themselves, and training leads to the half step. In an odd round the
    half step draws the opponents of the same prompts, then the policy goes back to w_t and is trained again. IPO brings
    u to (P(y_w) - P(y_l)) / 2, P being the mean probability to beat an opponent.

    Args:
        drawn: K, pictures of a prompt.
        temperature: of ``beats``.
    """

    def __init__(self, adapter: Adapter, drawn: int, temperature: float) -> None:
        self.drawn, self.temperature = drawn, temperature
        self.start = HeldWeights(adapter)
        self.own: Rollout | None = None

    def judged(self, number: int, rollout: Rollout) -> Rollout:
        """The pictures that round ``number`` trains on; their rewards are the probabilities P.

        Args:
            rollout: the pictures of the present policy, of all processes. In an odd round they are the opponents, and
                the policy goes back.
        """
        if number % 2 == 0:
            self.own = rollout
            self.start.move(1.0)
            probability = wins_among(rollout.by_scorer(self.drawn), self.temperature)
            return replace(rollout, reward=probability.flatten())
        assert self.own is not None
        probability = beats(self.own.by_scorer(self.drawn), rollout.by_scorer(self.drawn), self.temperature).mean(dim=2)
        self.start.restore()
        return replace(self.own, reward=probability.flatten())

    def state_dict(self) -> dict[str, Any]:
        if self.own is None:
            return {}
        tensors = {f"half.{name}": tensor for name, tensor in self.own.tensors().items()}
        return {"half_prompts": self.own.prompts, **tensors, **self.start.state_dict("start")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.own = None
        if "half_prompts" in state:
            tensors = {name.removeprefix("half."): v for name, v in state.items() if name.startswith("half.")}
            self.own = Rollout.of_tensors(state["half_prompts"], tensors)
            self.start.load_state_dict(state, "start")
