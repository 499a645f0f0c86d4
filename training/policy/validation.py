"""Policy against base during training: pictures, mean rewards and win rate on fixed prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffusion_align.adapters import Adapter
from diffusion_align.data import load_prompts
from diffusion_align.data.holes import Holes, load_holes
from diffusion_align.data.inpainting import open_inpainting
from diffusion_align.data.prompts import training_prompts
from diffusion_align.evaluation.compare import Sampled, SamplingSettings, compare, sample_and_score
from diffusion_align.evaluation.figures import image_grid
from diffusion_align.evaluation.stats import win_rate
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.rewards.context import score_with_context
from diffusion_align.sampling.sampler import to_uint8
from diffusion_align.training.engine.randomness import MASKS, mix

from .config import TrainConfig


@dataclass
class Validator:
    """Draws policy and, once, reference, and compares them.

    Attributes:
        scorer: None saves pictures only.
        holes: what inpainting models repaint, as many as prompts.
        held_out: scorers that are only watched; their means and win rates come as eval/NAME and eval/NAME_win_rate.
        pictures: how many rows the saved grids have.
    """

    adapter: Adapter
    prompts: Sequence[str]
    folder: Path
    scorer: RewardScorer | None
    settings: SamplingSettings
    holes: Holes | None = None
    held_out: Mapping[str, RewardScorer] = field(default_factory=dict)
    pictures: int = 6
    _base: Sampled | None = None

    def __call__(self, step: int) -> dict[str, float]:
        """Validate now; writes ``step-STEP.png`` into the folder and returns metrics named ``eval/...``."""
        if self._base is None:
            with self.adapter.reference():
                self._base = self._draw()
        policy = self._draw()
        self._save_grid(step, policy)
        watched = {}
        for name, scorer in self.held_out.items():
            ours, theirs = (
                score_with_context(scorer, sampled.images, self.prompts, self.holes).reward.tolist()
                for sampled in (policy, self._base)
            )
            watched[f"eval/{name}"] = sum(ours) / len(ours)
            watched[f"eval/{name}_win_rate"] = win_rate(ours, theirs).rate
        if policy.reward is None or self._base.reward is None:
            return watched
        rate = compare(policy, self._base)
        metrics = {
            "eval/win_rate": rate.rate,
            "eval/win_rate_low": rate.interval[0],
            "eval/win_rate_high": rate.interval[1],
            "eval/reward": float(policy.reward.reward.mean()),
            "eval/base_reward": float(self._base.reward.reward.mean()),
        }
        return (
            watched | metrics | {f"eval/{name}": float(values.mean()) for name, values in policy.reward.aspects.items()}
        )

    def _draw(self) -> Sampled:
        return sample_and_score(self.adapter, self.prompts, self.scorer, self.settings, self.holes)

    def _save_grid(self, step: int, policy: Sampled) -> None:
        assert self._base is not None
        count = min(self.pictures, len(self.prompts))
        before, after = to_uint8(self._base.images[:count]), to_uint8(policy.images[:count])
        rows = [list(pair) for pair in zip(before, after, strict=True)]
        grid = image_grid(rows, list(self.prompts[:count]), ["base", f"step {step}"])
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / f"step-{step:06d}.png")


def build_validator(config: TrainConfig, adapter: Adapter, output_dir: Path) -> Validator:
    """Validation on the prompts of a file, or on captions (for inpainting, pictures) of the validation split.

    Raises:
        ValueError, FileNotFoundError, OSError: prompts, pictures or scorers that cannot be used.
    """
    settings = SamplingSettings(
        config.validation_inference_steps, config.validation_guidance_scale, config.validation_seed
    )
    data, count, holes = config.validation_data(), config.num_validation_prompts, None
    if adapter.is_inpainting and data.mask_kinds and data.dataset is not None:
        source = open_inpainting(data.dataset, "validation")
        count, size = min(count, len(source)), data.resolution or adapter.default_resolution
        seeds = [mix(config.validation_seed, MASKS, i) for i in range(count)]
        holes = load_holes(source, range(count), seeds, size, data.mask_kinds)
        prompts = holes.prompts
    elif config.validation_prompts is not None:
        prompts = load_prompts(config.validation_prompts)
    else:
        assert data.dataset is not None  # TrainConfig.check
        prompts = training_prompts(data.dataset, "validation")
    return Validator(
        adapter,
        prompts[:count],
        output_dir / "samples",
        None if config.validation_scorer is None else load_scorer(config.validation_scorer),
        settings,
        holes,
        {name: load_scorer(name) for name in data.held_out_scorers},
    )
