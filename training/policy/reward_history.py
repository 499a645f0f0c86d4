"""What pictures of each prompt were worth so far: the baseline of DDPO (2305.13301)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RewardHistory:
    """The last rewards of every prompt.

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
