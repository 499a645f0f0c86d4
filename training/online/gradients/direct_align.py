"""Direct-Align: reward gradients through one step at any time, whose known noise is taken out again (SRPO)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.devices import send
from diffusion_align.objectives.errors import mse_per_sample
from diffusion_align.rewards import RewardScorer
from diffusion_align.training.engine.randomness import LABEL, TIMESTEP, generators, mix
from diffusion_align.training.policy.guided import GuidedPolicy

from .config import DRaFTConfig
from .draft import DRaFTMethod, TaskBatch


@dataclass(frozen=True)
class Branch:
    """One of the two steps that are learned from.

    Attributes:
        direction: 1 starts with more noise than it ends with, -1 with less.
        words: put before the prompts for the reward's first part, and for its second.
        discount: k at the least and at the largest time.
    """

    direction: int
    words: tuple[tuple[str, ...], tuple[str, ...]]
    discount: tuple[float, float]


def branches_of(config: DRaFTConfig) -> list[Branch]:
    """The denoising step; with words also the one to more noise, which is rewarded the other way round: there the
    prediction is subtracted, so that what raises a reward lowers it in the picture."""
    good, bad = config.positive_words, config.negative_words
    denoising, inversion = Branch(1, (good, bad), config.discount), Branch(-1, (bad, good), config.inverse_discount)
    return [denoising, inversion] if good else [denoising]


class DirectAlignMethod(DRaFTMethod):
    """Draws without a graph, then learns from one step between two times sigma, on the line from the picture x0 to the
    noise eps that it was drawn from (Direct-Align, 2509.06942):

        x  = (1 - sigma) x0 + sigma eps,   x' = x + (sigma' - sigma) u(x, sigma),
        x0' = (x' - sigma' eps) / (1 - sigma'),   r = (1 + k) r(x0', positive) - r(x0', negative)

    Raises:
        ValueError: a model with timesteps.
    """

    def __init__(self, config: DRaFTConfig, adapter: Adapter, accelerator: Accelerator, scorer: RewardScorer) -> None:
        if not adapter.path.straight:
            raise ValueError(
                f"direct_align is for flow models (SD3, FLUX), and {config.model} has timesteps: leave it out, and "
                "train draft learns from the last sampling steps"
            )
        super().__init__(config, adapter, accelerator, scorer)
        self.trained = GuidedPolicy(adapter, self.tasks.size, config.trained_guidance)
        self.branches = branches_of(config)

    def loss(self, batch: TaskBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the mean over branches of the pictures' rewards (or their hinge), and metrics.

        Raises:
            RunInterrupted: the scorer failed.
        """
        metrics: dict[str, Tensor] = {}
        with self.accelerator.autocast():
            x0, eps = self.finished(batch)
            conditions = self.trained.conditions(batch.prompts, None)
            time, share = self.times_of(batch)
            parts = []
            for branch in self.branches:
                clean, distance = self.recovered(x0, eps, time, branch.direction, conditions)
                first, reward = self.compared(clean, batch, branch, share)
                part = self.missing(reward).mean()
                parts.append(part + self.config.kl_beta * distance)
                name = "denoising" if branch.direction > 0 else "inversion"
                metrics |= {f"reward/{name}": reward.detach().mean(), f"kl/{name}": distance.detach()}
                metrics.setdefault("reward", first.detach().mean())
        loss = torch.stack(parts).mean()
        return loss, {"loss": loss.detach(), **metrics}

    @torch.no_grad()
    def finished(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Latents of the pictures as the sampler draws them, and the noise that they began with, (B, C, h, w) each."""
        conditions = self.policy.conditions(batch.prompts, None)
        x = eps = self.noise(batch)
        for step in range(len(self.times)):
            x = self.stepped(x, self.predict_x0(x, step, conditions), step)
        return x, eps

    def times_of(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Where both steps end, (B,) float32, uniform so that both begin in ``align_times``; and how far that is from
        the least time to the largest, (B,)."""
        low, high = self.config.align_times
        margin = self.config.align_step
        drawn = torch.cat([torch.rand(1, generator=each) for each in generators(batch.seeds, TIMESTEP)])
        share = margin + (1 - 2 * margin) * send(drawn, self.adapter.device)
        return low + (high - low) * share, share

    def recovered(
        self, x0: Tensor, eps: Tensor, end: Tensor, direction: int, conditions: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Clean latents (B, C, h, w) with the graph of one step to ``end`` (B,), and its mean squared distance to the
        reference's in predicted clean latents (0 unless ``kl_beta`` asks for it)."""
        config, path = self.config, self.adapter.path
        low, high = config.align_times
        start = end + direction * config.align_step * (high - low)
        now, after = path.at(start), path.at(end)
        x = now.noise(x0, eps)
        predicted = self.trained.predict(x, start, conditions).x0
        distance = torch.zeros((), device=x.device)
        if config.kl_beta:
            with self.adapter.reference():
                distance = mse_per_sample(predicted, self.trained.predict(x, start, conditions).x0).mean()
        return after.x0(path.gaussian(x, predicted, now, after, eta=0.0).mean, eps), distance

    def compared(self, x0: Tensor, batch: TaskBatch, branch: Branch, share: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (B,) with the first words, and what is maximised: (1 + k) of them less those with the second words;
        without words both are the reward."""
        images = self.decoded(x0)
        if not branch.words[0]:
            reward = self.rewards(images, batch.prompts)
            return reward, reward
        prompts = [worded(prompt, words, seed) for words in branch.words for prompt, seed in self._seeded(batch)]
        first, second = self.rewards(images.repeat(2, 1, 1, 1), prompts).chunk(2)
        least, largest = branch.discount
        return first, (1 + least + (largest - least) * share) * first - second

    @staticmethod
    def _seeded(batch: TaskBatch) -> list[tuple[str, int]]:
        return list(zip(batch.prompts, batch.seeds.tolist(), strict=True))


def worded(prompt: str, words: tuple[str, ...], seed: int) -> str:
    """The prompt after one of ``words``, by the picture's seed."""
    return f"{words[mix(seed, LABEL) % len(words)]}. {prompt}"
