"""What the artefact monitor measures beside the figures that every validation has."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.rewards import RewardScorer, load_scorer

from .picture_measures import blockiness, high_frequency, luma, picture_hashes


@dataclass(frozen=True)
class Further:
    """Energy of high frequencies, blockiness, near duplicates, and BRISQUE.

    Attributes:
        brisque: its scorer; None goes without.
    """

    brisque: RewardScorer | None = None

    @classmethod
    def load(cls, device: torch.device | str = "cpu") -> Further:
        """With BRISQUE if its files are installed; where they are not, a warning says so."""
        try:
            return cls(load_scorer("brisque", device=device))
        except ImportError as error:
            warnings.warn(f"the artefact monitor goes without BRISQUE: {error}", stacklevel=2)
            return cls()

    def measure(self, images: Tensor) -> tuple[dict[str, Tensor], list[int]]:
        """Figures of each of some pictures (n, 3, H, W), each (n,), and the hashes that tell near duplicates."""
        bright = luma(images)
        found = {"high_frequency": high_frequency(bright), "blockiness": blockiness(bright)}
        if self.brisque is not None:
            found["brisque"] = self.brisque.score(images, [""] * len(images)).reward
        return found, picture_hashes(images)
