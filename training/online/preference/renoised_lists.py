"""What the denoiser is asked about own lists and human pairs, and the statistics of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data import PairBatch
from diffusion_align.devices import send
from diffusion_align.objectives.list_stats import ListStats
from diffusion_align.process import average
from diffusion_align.training.engine.randomness import NOISE, mix, normal
from diffusion_align.training.online.renoising import renoising_times

from .config import OnlineDPOConfig
from .replay import clean_latents
from .rounds import ListItems


@dataclass(frozen=True)
class Part:
    """B lists of M pictures, chosen or best ones first.

    Attributes:
        prompts: B.
        x0: (B, M, C, h, w) on the device.
        seeds: (B,) int64 on the CPU, of timestep and noise.
        score: (B, M) rewards on the CPU; None of human pairs.
        mask: (B, M) bool on the CPU, which pictures there are; None: all.
        p: (B,) on the CPU, P(chosen is preferred); None is 1.
        weight: (B,) on the CPU, factors of the losses; None is 1.
        inpaint: (B, 1 + C, h, w).
    """

    prompts: list[str]
    x0: Tensor
    seeds: Tensor
    score: Tensor | None = None
    mask: Tensor | None = None
    p: Tensor | None = None
    weight: Tensor | None = None
    inpaint: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)


def own_part(items: ListItems, device: torch.device, temperature: float | None) -> Part:
    """Lists of own pictures. All of a prompt meet the same timestep and noise, level by level.

    Args:
        temperature: P(chosen is preferred) = sigmoid((r_w - r_l) / temperature); None: it is certain.
    """
    lists = items.lists
    columns = zip(lists.group.tolist(), items.column.tolist(), strict=True)
    seeds = torch.tensor([mix(group, column, items.number) for group, column in columns])
    p = None if temperature is None else torch.sigmoid((lists.reward[:, 0] - lists.reward[:, 1]) / temperature)
    return Part(lists.prompts, send(lists.latents, device), seeds, lists.reward, lists.mask, p, None, lists.inpaint)


def human_part(batch: PairBatch, adapter: Adapter) -> Part:
    """Human pairs; call it under autocast, because the VAE encodes them."""
    captions = [caption or "" for caption in batch.captions]
    p = None if bool((batch.preference == 1).all()) else batch.preference
    weight = None if bool((batch.weight == 1).all()) else batch.weight
    return Part(captions, clean_latents(adapter, batch), batch.seeds, None, None, p, weight)


@dataclass(frozen=True)
class Renoised:
    """All lists of several parts at noise levels that follow from their seeds.

    The M B rows of a part are the first picture of each list, then the second, and so on.

    Attributes:
        x_t, target: (rows, C, h, w).
        t: (rows,).
        inpaint: (rows, 1 + C, h, w), of inpainting models.
        mask: (rows, 1, h, w) on the device: where errors are taken of inpainting models; None is everywhere.
        shapes: M and B of each part.
    """

    x_t: Tensor
    target: Tensor
    t: Tensor
    inpaint: Tensor | None
    mask: Tensor | None
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def make(cls, adapter: Adapter, parts: Sequence[Part], config: OnlineDPOConfig) -> Renoised:
        """At times as the settings say; all pictures of a list meet the same."""
        path, device = adapter.path, adapter.device
        x_t, target, times = [], [], []
        for part in parts:
            members = part.x0.shape[1]
            t = renoising_times(config, adapter, part.seeds, part.x0.shape[-2:], config.max_timestep)
            t = send(t, device).repeat(members)
            eps = send(normal(part.seeds, NOISE, part.x0.shape[2:]), device).repeat(members, 1, 1, 1)
            flat = part.x0.transpose(0, 1).flatten(0, 1)
            x_t.append(path.noise(flat, eps, t))
            target.append(path.target(flat, eps, t))
            times.append(t)
        inpaint, mask = parts[0].inpaint, None
        if inpaint is not None:
            inpaint = inpaint.repeat(parts[0].x0.shape[1], 1, 1, 1)
            mask = send(inpaint[:, :1], device)
        shapes = tuple((part.x0.shape[1], len(part)) for part in parts)
        return cls(torch.cat(x_t), torch.cat(target), torch.cat(times), inpaint, mask, shapes)

    def errors(self, output: Tensor, other: Tensor | None = None) -> Tensor:
        """Mean squared distance of ``output`` to ``other`` (default: the target), (rows,) float32."""
        other = self.target if other is None else other
        return average((output.float() - other.float()).square(), self.mask)

    def columns(self, values: Tensor) -> list[Tensor]:
        """Numbers of the rows (rows,), as (B, M) of each part."""
        parts = values.split([members * count for members, count in self.shapes])
        return [part.view(shape).T for part, shape in zip(parts, self.shapes, strict=True)]

    def statistics(self, parts: Sequence[Part], output: Tensor, reference: Tensor | None) -> list[ListStats]:
        """Of each part, from raw outputs (rows, C, h, w)."""
        error = self.columns(self.errors(output))
        overlap: Sequence[Tensor | None] = [None] * len(parts)
        with torch.no_grad():
            if all(members == 2 for members, _ in self.shapes):  # of lists nobody asks for it
                off = output.float() - self.target.float()
                firsts = torch.cat([block[:count].repeat(2, 1, 1, 1) for block, (_, count) in self.blocks(off)])
                overlap = self.columns(average(firsts * off, self.mask))
            moved = None if reference is None else self.columns(self.errors(output.detach(), reference))
        ours = None if reference is None else self.columns(self.errors(reference))
        return [
            ListStats(
                error[i],
                None if ours is None else ours[i],
                None if part.mask is None else send(part.mask, output.device),
                None if moved is None else moved[i],
                overlap[i],
            )
            for i, part in enumerate(parts)
        ]

    def blocks(self, rows: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
        """The rows of each part, with its M and B."""
        return list(zip(rows.split([m * b for m, b in self.shapes]), self.shapes, strict=True))
