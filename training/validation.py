"""Policy against base during training: pictures, mean rewards and win rate on fixed prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.adapters import Adapter
from diffusion_align.evaluation.compare import Sampled, SamplingSettings, compare, sample_and_score
from diffusion_align.evaluation.figures import image_grid
from diffusion_align.rewards import RewardScorer
from diffusion_align.sampling.sampler import to_uint8


@dataclass
class Validator:
    """Draws policy and, once, reference, and compares them.

    Attributes:
        scorer: None saves pictures only.
        pictures: how many rows the saved grids have.
    """

    adapter: Adapter
    prompts: Sequence[str]
    folder: Path
    scorer: RewardScorer | None
    settings: SamplingSettings
    pictures: int = 6
    _base: Sampled | None = None

    def __call__(self, step: int) -> dict[str, float]:
        """Validate now; writes ``step-STEP.png`` into the folder and returns metrics named ``eval/...``."""
        if self._base is None:
            with self.adapter.reference():
                self._base = sample_and_score(self.adapter, self.prompts, self.scorer, self.settings)
        policy = sample_and_score(self.adapter, self.prompts, self.scorer, self.settings)
        self._save_grid(step, policy)
        if policy.reward is None or self._base.reward is None:
            return {}
        rate = compare(policy, self._base)
        metrics = {
            "eval/win_rate": rate.rate,
            "eval/win_rate_low": rate.interval[0],
            "eval/win_rate_high": rate.interval[1],
            "eval/reward": float(policy.reward.reward.mean()),
            "eval/base_reward": float(self._base.reward.reward.mean()),
        }
        return metrics | {f"eval/{name}": float(values.mean()) for name, values in policy.reward.aspects.items()}

    def _save_grid(self, step: int, policy: Sampled) -> None:
        assert self._base is not None
        count = min(self.pictures, len(self.prompts))
        before, after = to_uint8(self._base.images[:count]), to_uint8(policy.images[:count])
        rows = [list(pair) for pair in zip(before, after, strict=True)]
        grid = image_grid(rows, list(self.prompts[:count]), ["base", f"step {step}"])
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / f"step-{step:06d}.png")
