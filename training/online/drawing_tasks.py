"""What pictures are drawn for: an endless shuffled stream of prompts, or of pictures with holes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusion_align.adapters import Adapter
from diffusion_align.data.holes import Holes, load_holes
from diffusion_align.data.inpainting import open_inpainting
from diffusion_align.data.loader import Corruption
from diffusion_align.data.prompts import training_prompts
from diffusion_align.training.engine.randomness import MASKS, TASKS, mix

from .config import OnlineConfig


class Tasks:
    """Prompts, or pictures with holes for inpainting models; task ``i`` depends on the seed and i alone."""

    def __init__(self, config: OnlineConfig, adapter: Adapter) -> None:
        self.config = config
        self.size = config.resolution or adapter.default_resolution
        self.source = open_inpainting(config.dataset, config.dataset_split) if adapter.is_inpainting else None
        self.prompts = [] if self.source else training_prompts(config.dataset, config.dataset_split)
        self.corruption = Corruption(config.max_corrupt)
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.prompts) if self.source is None else len(self.source)

    def take(self, positions: Sequence[int]) -> tuple[list[str], Holes | None]:
        """Prompts of the tasks at ``positions`` of the stream and, for inpainting, their pictures and masks."""
        indices = [self._index(position) for position in positions]
        if self.source is None:
            return [self.prompts[index] for index in indices], None
        seeds = [mix(self.config.seed, MASKS, position) for position in positions]
        holes = load_holes(self.source, indices, seeds, self.size, self.config.mask_kinds, self.corruption)
        return holes.prompts, holes

    def names(self, positions: Sequence[int]) -> list[str]:
        """What tells the tasks at ``positions`` apart: prompts, or the numbers of the pictures."""
        indices = [self._index(position) for position in positions]
        return [str(index) if self.source is not None else self.prompts[index] for index in indices]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        if self._order[0] != epoch:
            shuffle = torch.Generator().manual_seed(mix(self.config.seed, TASKS, epoch))
            self._order = epoch, torch.randperm(len(self), generator=shuffle).tolist()
        return self._order[1][place]
