"""Policy against base during training: pictures, mean rewards and win rate on fixed prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from diffusion_align.evaluation.artefacts import Further
from diffusion_align.evaluation.compare import Sampled, SamplingSettings, compare, sample_and_score
from diffusion_align.evaluation.figures import image_grid
from diffusion_align.evaluation.stats import win_rate
from diffusion_align.rewards import RewardOutput, RewardScorer, load_scorer
from diffusion_align.rewards.combine import Ensemble
from diffusion_align.rewards.context import score_with_context
from diffusion_align.sampling.sampler import to_uint8
from diffusion_align.training.engine.randomness import MASKS, mix

from .config import TrainConfig
from .watching.divergence import DivergenceProbe
from .watching.picture_watch import PictureWatch, ensemble_spread, standardised
from .watching.timestep_bins import TimestepBins
from .watching.watch_building import ValidationRules
from .watching.watch_limits import LEAST_HELD_OUT, LEAST_PROMPTS
from .watching.watch_rules import HeldOutRule


@dataclass
class Validator:
    """Draws policy and, once, reference, and compares them. Each process of a run draws and scores its share.

    Attributes:
        prompts: one a picture: the K pictures of a prompt side by side.
        scorer: None saves pictures only.
        holes: what inpainting models repaint, as many as prompts.
        held_out: scorers that are only watched; their means and win rates come as eval/NAME and eval/NAME_win_rate.
        pictures: how many rows the saved grids have.
        seeds_per_prompt: K; rewards are compared prompt by prompt, as means over K pictures.
        watch: figures of the pictures against the base's own spread; None: not measured.
        held_out_rule: told the held-out mean, prompt by prompt; None: nobody asks.
        ensemble: members of the reward that is trained on, whose disagreement is watched.
        divergence: measures the divergence from the base; None: not measured.
    """

    adapter: Adapter
    prompts: Sequence[str]
    folder: Path
    scorer: RewardScorer | None
    settings: SamplingSettings
    holes: Holes | None = None
    held_out: Mapping[str, RewardScorer] = field(default_factory=dict)
    pictures: int = 6
    seeds_per_prompt: int = 1
    watch: PictureWatch | None = None
    held_out_rule: HeldOutRule | None = None
    ensemble: Mapping[str, RewardScorer] = field(default_factory=dict)
    divergence: Callable[[], dict[str, float]] | None = None
    _base: Sampled | None = None
    _base_scores: dict[tuple[str, str], list[float]] = field(default_factory=dict, init=False)

    def __call__(self, step: int) -> dict[str, float]:
        """Validate now; the first process writes ``step-STEP.png`` into the folder. Called by all processes together.

        Returns:
            Metrics named ``eval/...``, over the prompts of all processes.
        """
        if self._base is None:
            with self.adapter.reference():
                self._base = self.draw()
            self._base_scores = {}
        policy = self.draw()
        if PartialState().is_main_process:
            self._save_grid(step, policy)
        base, watched = self._base, {}
        sides = {}
        for name, scorer in self.held_out.items():
            sides[name] = ours, theirs = self._by_prompt(scorer, policy), self._of_base("held out", name, scorer)
            watched[f"eval/{name}"] = sum(ours) / len(ours)
            watched[f"eval/{name}_win_rate"] = win_rate(ours, theirs).rate
        if self.held_out_rule is not None and len(sides) >= LEAST_HELD_OUT:
            signed = [(sides[name], scorer.higher_is_better) for name, scorer in self.held_out.items()]
            watched |= self.held_out_rule.measure(standardised(signed))
        if self.ensemble:
            scored = [
                (
                    (self._by_prompt(scorer, policy, 1), self._of_base("ensemble", name, scorer, 1)),
                    scorer.higher_is_better,
                )
                for name, scorer in self.ensemble.items()
            ]
            watched |= ensemble_spread(scored)
        if self.watch is not None:
            watched |= self.watch(policy.images, base.images)
        if self.divergence is not None:
            watched |= self.divergence()
        if policy.reward is None or base.reward is None:
            return watched
        rate = compare(self._of_prompts(policy), self._of_prompts(base))
        metrics = {
            "eval/win_rate": rate.rate,
            "eval/win_rate_low": rate.interval[0],
            "eval/win_rate_high": rate.interval[1],
            "eval/reward": float(policy.reward.reward.mean()),
            "eval/base_reward": float(base.reward.reward.mean()),
        }
        return (
            watched | metrics | {f"eval/{name}": float(values.mean()) for name, values in policy.reward.aspects.items()}
        )

    def _by_prompt(self, scorer: RewardScorer, sampled: Sampled, seeds: int | None = None) -> list[float]:
        """Scores of each prompt, means over its pictures (or over ``seeds`` of them)."""
        reward = score_with_context(scorer, sampled.images, self.prompts, self.holes).reward
        return prompt_means(reward, seeds or self.seeds_per_prompt).tolist()

    def _of_base(self, kind: str, name: str, scorer: RewardScorer, seeds: int | None = None) -> list[float]:
        """The same of the base, whose pictures are scored once."""
        assert self._base is not None
        if (kind, name) not in self._base_scores:
            self._base_scores[kind, name] = self._by_prompt(scorer, self._base, seeds)
        return self._base_scores[kind, name]

    def _of_prompts(self, sampled: Sampled) -> Sampled:
        """With one reward a prompt."""
        assert sampled.reward is not None
        return replace(sampled, reward=RewardOutput(prompt_means(sampled.reward.reward, self.seeds_per_prompt)))

    def draw(self) -> Sampled:
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
        shown = slice(0, self.pictures * self.seeds_per_prompt, self.seeds_per_prompt)
        before, after = to_uint8(self._base.images[shown]), to_uint8(policy.images[shown])
        rows = [list(pair) for pair in zip(before, after, strict=True)]
        grid = image_grid(rows, list(self.prompts[shown]), ["base", f"step {step}"])
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / f"step-{step:06d}.png")


def prompt_means(rewards: Tensor, seeds_per_prompt: int) -> Tensor:
    """Means (P,) over the K pictures of each prompt, of rewards (P K,); with K = 1 the rewards themselves."""
    return rewards if seeds_per_prompt == 1 else rewards.view(-1, seeds_per_prompt).mean(dim=1)


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


def build_validator(
    config: TrainConfig,
    adapter: Adapter,
    output_dir: Path,
    rules: ValidationRules | None = None,
    reward: RewardScorer | None = None,
    prompts: list[str] | None = None,
) -> Validator:
    """Validation on the prompts of a file, or on captions (for inpainting, pictures) of the validation split.

    Args:
        rules: of the run's watchdog; None: held-out scorers and artefacts are only logged.
        reward: that the run learns from; the members of an ensemble are watched.
        prompts: instead of those that the settings name.

    Raises:
        ValueError, FileNotFoundError, OSError: prompts, pictures or scorers that cannot be used.
    """
    settings = SamplingSettings(
        config.validation_inference_steps, config.validation_guidance_scale, config.validation_seed
    )
    data, count, holes = config.validation_data(), config.num_validation_prompts, None
    size = data.resolution or adapter.default_resolution
    if adapter.is_inpainting and data.mask_kinds and data.dataset is not None:
        source = open_inpainting(data.dataset, "validation")
        count = min(count, len(source))
        seeds = [mix(config.validation_seed, MASKS, i) for i in range(count)]
        holes = load_holes(source, range(count), seeds, size, data.mask_kinds)
        prompts = holes.prompts
    elif prompts is None and config.validation_prompts is not None:
        prompts = load_prompts(config.validation_prompts)
    elif prompts is None:
        assert data.dataset is not None  # TrainConfig.check
        prompts = _captions(data.dataset)
    prompts, each = prompts[:count], config.validation_seeds_per_prompt
    asked = "artefact_monitor" if config.artefact_monitor else "stop_on artefacts"
    if (config.artefact_monitor or "artefacts" in config.stop_on) and len(prompts) < LEAST_PROMPTS:
        raise ValueError(f"{asked} needs at least {LEAST_PROMPTS} validation prompts, found {len(prompts)}")
    further = Further.load() if config.artefact_monitor else None
    watch = PictureWatch(each, None if rules is None else rules.artefacts, further)
    probe = None
    if config.kl_prompts:
        shown = min(config.kl_prompts, len(prompts))
        probe = DivergenceProbe(
            adapter,
            prompts[:shown],
            size,
            config.validation_inference_steps,
            config.validation_guidance_scale,
            config.validation_seed,
            TimestepBins(config.timestep_bins, adapter.path.num_timesteps),
            None if holes is None else holes.at(list(range(shown))),
        )
    scorer = None if config.validation_scorer is None else load_scorer(config.validation_scorer)
    watched = {name: load_scorer(name) for name in config.held_out_scorers}
    if scorer is not None:
        _check_scorer("validation_scorer", str(config.validation_scorer), scorer, prompts)
    for name, held in watched.items():
        _check_scorer("held_out_scorers", name, held, prompts)
    repeated = [row for row in range(len(prompts)) for _ in range(each)]
    return Validator(
        adapter,
        [prompts[row] for row in repeated],
        output_dir / "samples",
        scorer,
        settings,
        holes if holes is None or each == 1 else holes.at(repeated),
        watched,
        seeds_per_prompt=each,
        watch=watch if len(prompts) >= LEAST_PROMPTS else None,
        held_out_rule=None if rules is None else rules.held_out,
        ensemble=ensemble_members(reward),
        divergence=probe,
    )


def _captions(dataset: str) -> list[str]:
    try:
        return training_prompts(dataset, "validation")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Validation draws the captions of that split: give --validation-prompts, a file with one prompt "
            "a line, or set eval_steps to 0"
        ) from error


def _check_scorer(setting: str, name: str, scorer: RewardScorer, prompts: Sequence[str]) -> None:
    """Raise ValueError, naming the setting, where ``scorer`` cannot judge pictures of ``prompts``."""
    try:
        scorer.check_prompts(prompts)
    except ValueError as error:
        flag = setting.replace("_", "-")
        raise ValueError(
            f"{setting} {name} cannot judge the validation prompts: {error}. Give another one with --{flag}, e.g. clip "
            "or pickscore (diffusion-align scorers lists all)"
        ) from error


def ensemble_members(reward: RewardScorer | None) -> dict[str, RewardScorer]:
    """The scorers of an ensemble, by place and name; none of any other reward."""
    if not isinstance(reward, Ensemble):
        return {}
    members = [member for member in reward.members if isinstance(member, RewardScorer)]
    return {f"{place}.{member.name}": member for place, member in enumerate(members)}
