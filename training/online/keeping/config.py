"""Settings of what RAFT keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusion_align.training.engine.config import Fraction, Positive


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Which of a prompt's pictures are learned from, and how much each counts."""

    keep: Positive = 1
    """Pictures kept of each prompt's num_generations, for keep_by reward."""
    keep_by: Literal["reward", "all"] = "reward"
    """Which those are: the best ones; or, however many they are, those that every one of the scorers puts above its
    threshold (CRAFT, 2603.18991)."""
    keep_quantile: Fraction | None = None
    """keep_by all: a scorer's threshold is this quantile of its rewards of the prompt's pictures; unset: their mean."""
    advantage_weights: bool = False
    """Weigh each kept picture's loss by max(A, 0), its advantage (CRAFT)."""

    def check_keeping(self, drawn: int, zero_advantage: str) -> None:
        """Raises ValueError where the settings do not fit each other or the ``drawn`` pictures of a prompt."""
        if self.keep > drawn:
            raise ValueError(f"keep = {self.keep}: only {drawn} pictures of a prompt are drawn")
        if self.keep_by == "reward" and self.keep_quantile is not None:
            raise ValueError(f"keep_quantile = {self.keep_quantile} is keep_by all's threshold, not that of reward")
        if self.keep_by == "all" and self.keep != 1:
            raise ValueError(f"keep = {self.keep} is for keep_by reward: keep_by all keeps what passes")
        if self.keep_by == "all" and zero_advantage == "skip":
            raise ValueError("zero_advantage skip: keep_by all leaves out pictures itself, set it to keep")

    def most_kept(self, drawn: int) -> int:
        """Pictures of a prompt that are kept at most."""
        return drawn if self.keep_by == "all" else self.keep
