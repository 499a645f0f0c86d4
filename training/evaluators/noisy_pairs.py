"""Judged pairs as latent evaluators see them: pictures encoded once, noised to every level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_align.adapters import Adapter
from diffusion_align.data import ComparisonBatch, ComparisonExamples, Comparisons, collate_comparisons
from diffusion_align.data.comparisons import ComparisonExample
from diffusion_align.data.types import CorruptImageError
from diffusion_align.process import Path, log_snr
from diffusion_align.quiet import progress_bar
from diffusion_align.rewards import RewardScorer
from diffusion_align.training.engine.randomness import NOISE, TIMESTEP, generators, normal


@dataclass(frozen=True)
class NoisyBatch:
    """B judged pairs of clean latents, and the level and noise that they are judged at.

    Attributes:
        pairs: ``images`` are latents (2, B, C, h, w) float32; ``labels`` (B, 1 + aspects).
        targets: (2, B) the teacher's standardised scores, or None.
        t: (B,) times, in the unit of the path; both pictures of a pair share it and ``noise`` (B, C, h, w).
    """

    pairs: ComparisonBatch
    targets: Tensor | None
    t: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> NoisyBatch:
        targets = None if self.targets is None else self.targets.to(device)
        return NoisyBatch(self.pairs.to(device), targets, self.t.to(device), self.noise.to(device))


class EncodedPairs:
    """The pairs of a data set with their latents (posterior means, float16) in memory, for ``ExampleLoader``."""

    def __init__(
        self, adapter: Adapter, comparisons: Comparisons, teacher: RewardScorer | None = None, progress: bool = False
    ) -> None:
        self.comparisons = comparisons
        side = adapter.default_resolution

        def to_pixels(images: Tensor) -> Tensor:
            return interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)

        self.decoded = ComparisonExamples(comparisons, to_pixels)
        self.latents: list[Tensor | None] = []
        self.targets: list[Tensor] = []
        self.device = adapter.device
        batch = 32
        bar = progress_bar(range(0, len(comparisons), batch), desc="encoding pictures", disable=not progress)
        for start in bar:
            self._encode(adapter, teacher, range(start, min(start + batch, len(comparisons))))
        if teacher is not None:
            scores = torch.stack(self.targets)
            self.targets = list((scores - scores.mean()) / scores.std().clamp(min=1e-6))

    @torch.no_grad()
    def _encode(self, adapter: Adapter, teacher: RewardScorer | None, rows: range) -> None:
        pictures: list[Tensor | None] = []
        for row in rows:
            try:
                pictures.append(self.decoded.example(row, 0, False).images)
            except CorruptImageError:
                pictures.append(None)
        whole = [picture for picture in pictures if picture is not None]
        if not whole:
            self.latents += [None] * len(rows)
            self.targets += [torch.zeros(2)] * len(rows)
            return
        both = torch.cat(whole)  # not moved: the adapter takes a few at a time
        encoded = iter(adapter.encode_images(both * 2 - 1).half().cpu().unflatten(0, (-1, 2)))
        self.latents += [None if picture is None else next(encoded) for picture in pictures]
        if teacher is not None:
            prompts = [self.comparisons[row].prompt for row, p in zip(rows, pictures, strict=True) if p is not None]
            reward = teacher.score(both, [prompt for prompt in prompts for _ in range(2)]).reward
            scored = iter(reward.float().cpu().unflatten(0, (-1, 2)))
            self.targets += [torch.zeros(2) if picture is None else next(scored) for picture in pictures]

    def __len__(self) -> int:
        return len(self.comparisons)

    def sizes(self) -> list[tuple[int, int]]:
        return [(0, 0)] * len(self)

    def example(self, index: int, seed: int, drop_caption: bool) -> tuple[ComparisonExample, Tensor | None]:
        latents = self.latents[index]
        if latents is None:
            raise CorruptImageError(f"row {self.comparisons.rows[index]}: an image cannot be decoded")
        target = self.targets[index] if self.targets else None
        return ComparisonExample(latents.float(), None, self.comparisons[index]), target


def collate_noisy(
    path: Path, examples: Sequence[tuple[ComparisonExample, Tensor | None]], seeds: Sequence[int]
) -> NoisyBatch:
    """Stack encoded pairs; level and noise of each follow from its seed."""
    pairs = collate_comparisons([example for example, _ in examples], seeds)
    targets = [
        target.flip(0) if seed % 2 else target  # as collate_comparisons exchanges the pair
        for (_, target), seed in zip(examples, seeds, strict=True)
        if target is not None
    ]
    numbers = torch.tensor([seed % 2**63 for seed in seeds])
    return NoisyBatch(
        pairs,
        torch.stack(targets, dim=1) if targets else None,
        path.draw_times(generators(numbers, TIMESTEP), *path.span),
        normal(numbers, NOISE, pairs.images.shape[2:]),
    )


def known_scales(pairs: ComparisonBatch) -> Tensor:
    """(2, B) guidance scales, 1 where they are unknown."""
    return pairs.scales.nan_to_num(1.0)


def noised(adapter: Adapter, batch: NoisyBatch) -> Tensor:
    """Both pictures at the pair's level with the pair's noise, as a variance-preserving path has them, (2, B, C, h, w):
    guidance shows evaluators the latents of every path so."""
    level = adapter.path.at(batch.t)
    return torch.stack([level.rescaled(adapter.path.noise(side, batch.noise, batch.t)) for side in batch.pairs.images])


def log_snrs(adapter: Adapter, t: Tensor) -> Tensor:
    """Of the levels at times t (B,), (B,) float32."""
    return log_snr(adapter.path.at(t).preserving().alpha_sq.flatten())


def seeded_batches(examples: EncodedPairs, path: Path, batch_size: int = 64) -> Iterator[NoisyBatch]:
    """Every readable pair once, at levels and with noise that are always the same."""
    rows = [row for row, latents in enumerate(examples.latents) if latents is not None]
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        seeds = [2 * (row * 7919 + 1) for row in part]  # even: pairs are not exchanged
        yield collate_noisy(path, [examples.example(row, 0, False) for row in part], seeds)
