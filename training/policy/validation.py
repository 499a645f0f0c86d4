"""Policy against base during training: pictures, mean rewards and win rate on fixed prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data import load_prompts
from diffusion_align.data.holes import Holes, load_holes
from diffusion_align.data.inpainting import open_inpainting
from diffusion_align.data.prompts import training_prompts
from diffusion_align.evaluation.compare import Sampled, SamplingSettings, compare, sample_and_score
from diffusion_align.evaluation.figures import image_grid
from diffusion_align.evaluation.stats import win_rate
from diffusion_align.rewards import RewardOutput, RewardScorer, load_scorer
from diffusion_align.rewards.context import score_with_context
from diffusion_align.sampling.sampler import to_uint8
from diffusion_align.training.engine.randomness import MASKS, mix

from .config import TrainConfig


@dataclass
class Validator:
    """Draws policy and, once, reference, and compares them. Each process of a run draws and scores its share.

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
        """Validate now; the first process writes ``step-STEP.png`` into the folder. Called by all processes together.

        Returns:
            Metrics named ``eval/...``, over the prompts of all processes.
        """
        if self._base is None:
            with self.adapter.reference():
                self._base = self._draw()
        policy = self._draw()
        if PartialState().is_main_process:
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
        """All prompts' pictures.

        Shares are equal, because processes that hold parts of a network call it equally often: where prompts run out,
        the last one is drawn again, and left out afterwards.
        """
        state, count = PartialState(), len(self.prompts)
        share = -(-count // state.num_processes)
        first = share * state.process_index
        rows = [min(first + i, count - 1) for i in range(share)]
        sampled = sample_and_score(
            self.adapter,
            [self.prompts[row] for row in rows],
            self.scorer,
            replace(self.settings, seed=self.settings.seed + first),
            None if self.holes is None else self.holes.at(rows),
        )
        return sampled if state.num_processes == 1 else gathered(sampled, count)

    def _save_grid(self, step: int, policy: Sampled) -> None:
        assert self._base is not None
        count = min(self.pictures, len(self.prompts))
        before, after = to_uint8(self._base.images[:count]), to_uint8(policy.images[:count])
        rows = [list(pair) for pair in zip(before, after, strict=True)]
        grid = image_grid(rows, list(self.prompts[:count]), ["base", f"step {step}"])
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / f"step-{step:06d}.png")


def gathered(sampled: Sampled, count: int) -> Sampled:
    """The first ``count`` pictures of all processes, and their rewards; called by all together, with equal shares."""
    device = PartialState().device

    def together(tensor: Tensor) -> Tensor:
        whole: Tensor = gather(tensor.to(device).contiguous())
        return whole[:count].to(tensor.device)

    reward = sampled.reward
    if reward is not None:
        aspects = {name: together(values) for name, values in reward.aspects.items()}
        reward = RewardOutput(together(reward.reward), aspects)
    return Sampled(together(sampled.images), reward)


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
