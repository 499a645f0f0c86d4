"""Settings of the methods that draw their own pictures and learn from a scorer's reward of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from diffusion_align.training.engine.config import (
    NonNegative,
    NonNegativeFloat,
    PlanNotes,
    Positive,
    PositiveFloat,
)
from diffusion_align.training.policy.config import MemoryNeeds, TrainConfig, VAEJob, ValidationData, Work
from diffusion_align.training.policy.data_config import TrainingData
from diffusion_align.training.policy.flow_times import DrawnTimes, TimeRange

from .keeping.config import Keeping
from .stepping.config import Stepping

#: Timesteps that models are trained with; a model's own schedule may be shorter.
LONGEST_SCHEDULE = 1000


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(TrainingData, TrainConfig):
    """What every method that learns from its own pictures shares."""

    takes_scorer: ClassVar[bool] = True
    guidance_settings: ClassVar[tuple[str, ...]] = (*TrainConfig.guidance_settings, "guidance_scale")
    changeable: ClassVar[frozenset[str]] = frozenset({"scorer_timeout", "max_corrupt"})
    stop_rules: ClassVar[frozenset[str]] = TrainConfig.stop_rules | {"spread"}

    # -- tasks
    dataset: str = "scenes-pairs"
    """Prompts: a file (.txt, .csv, .jsonl, .parquet), or a data set of pairs, whose captions are taken. Inpainting
    models: scenes-holes, scenes-objects, or a folder of pictures (metadata.jsonl may give caption and mask)."""
    mask_kinds: tuple[Literal["box", "brush", "half", "border"], ...] = ("box", "brush", "half")
    """Random masks of pictures that come without one."""
    max_corrupt: NonNegative = 100
    """Inpainting models: how many pictures that cannot be decoded, and masks that mark nothing or everything, are
    skipped before the run stops."""
    resolution: Positive | None = None
    """Side of the pictures in pixels; unset takes the model's own."""

    # -- reward
    scorers: tuple[str, ...] = ("scenes-vp",)
    """Reward: names (docs/rewards.md) or folders of trained scorers; several make an ensemble."""
    ensemble: Literal["mean", "median", "min", "mean-std", "quantile"] = "mean"
    """How an ensemble's standardised members are merged."""
    scorer_timeout: NonNegativeFloat = 600.0
    """Seconds a batch's scores may take before the run stops; 0 sets no limit, for a debugger inside a scorer."""

    # -- sampling
    num_inference_steps: Positive = 20
    """Sampling steps of a rollout."""
    guidance_scale: NonNegativeFloat = 5.0
    """Classifier-free guidance of rollouts and updates; 1 switches it off and halves the cost."""

    @property
    def guided_rows(self) -> int:
        """Rows of the network for one guided prediction, by two predictions where the model is not told the scale
        (``guided_by``)."""
        return 2 if self.guidance_scale > 1 else 1

    def validation_data(self) -> ValidationData:
        return ValidationData(self.dataset, self.mask_kinds, self.resolution)

    def check(self) -> None:
        super().check()
        if "spread" in self.stop_on and (len(self.scorers) < 2 or not self.eval_steps):
            raise ValueError("stop_on spread needs an ensemble, at least 2 scorers, and validation: set eval_steps")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(TimeRange, OnlineConfig):
    """What the methods share that compare several pictures of one prompt."""

    changeable: ClassVar[frozenset[str]] = frozenset({"rollout_batch_size"})

    num_generations: Positive = 8
    """Pictures of one prompt, compared with each other."""
    prompts_per_rollout: Positive = 4
    """Prompts per device and rollout."""
    rollout_batch_size: Positive = 32
    """Pictures drawn and scored at once."""
    advantage_baseline: Literal["group", "history", "batch"] = "group"
    """Rewards are compared with the mean of the prompt's pictures, of the prompt's last rewards in the run (DDPO), or
    of all pictures of the rollout (PrefPaint)."""
    advantage_scale: Literal["batch", "group", "global", "none"] = "batch"
    """Deviations from that mean are divided by their own spread in the rollout, by that of the prompt's rewards, by
    that of all rewards (flow_grpo), or by 1."""
    history_size: Positive = 16
    """Rewards remembered of each prompt, for advantage_baseline history."""
    history_min_count: Positive = 16
    """A prompt with fewer remembered rewards is compared with all pictures of the rollout."""
    advantage_clip: PositiveFloat = 5.0
    """Largest absolute advantage."""
    zero_advantage: Literal["keep", "skip"] = "keep"
    """Prompts whose pictures all have advantage 0, e.g. equal rewards: train on them too, or leave them out, as
    flow_grpo. How many there are is logged either way."""
    min_timestep: NonNegative = 0
    """Smallest timestep that is trained on; large ones decide what is seen where, small ones only details."""

    def time_range(self, straight: bool) -> tuple[float, float]:
        """Smallest and largest time that is trained on, in the unit of a path that is ``straight`` or has timesteps."""
        return (self.min_time, self.max_time) if straight else (self.min_timestep, LONGEST_SCHEDULE)

    def items_per_rollout(self) -> int:
        """Training items of one process's rollout: pictures that are kept, times the items of each."""
        return self.prompts_per_rollout * self.num_generations

    def check(self) -> None:
        super().check()
        baseline, scale = self.advantage_baseline, self.advantage_scale
        compared = (baseline == "group" and scale != "none") or (baseline == "batch" and scale == "group")
        if self.num_generations < 2 and compared:
            raise ValueError(
                f"num_generations = 1: advantage_baseline {baseline} with advantage_scale {scale} compares pictures of "
                "a prompt with each other, expected at least 2"
            )
        if self.history_min_count > self.history_size:
            raise ValueError(
                f"history_min_count = {self.history_min_count}: only history_size = {self.history_size} are remembered"
            )
        if self.min_timestep >= LONGEST_SCHEDULE:
            raise ValueError(f"min_timestep = {self.min_timestep}: expected less than {LONGEST_SCHEDULE}")
        if self.knows_items():
            self.check_updates(self.items_per_rollout())

    def knows_items(self) -> bool:
        """Whether ``items_per_rollout`` is known without the model."""
        return True

    def check_updates(self, items: int) -> None:
        """Rollouts of ``items`` training items must be whole numbers of optimiser steps: an update never mixes two.

        Raises:
            ValueError: they are not.
        """
        used = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if items % used:
            raise ValueError(
                f"a rollout has {items} training items, an optimiser step takes {used} (per_device_train_batch_size x "
                "gradient_accumulation_steps): the first must be a multiple of the second"
            )

    def memory_needs(self) -> MemoryNeeds:
        return MemoryNeeds(
            self.resolution, rows=self.trained_rows, vae_jobs=(VAEJob("decode", self.rollout_batch_size),)
        )

    @property
    def trained_rows(self) -> int:
        """Rows of the network for a prediction that is trained."""
        return self.guided_rows

    def network_calls(self) -> dict[str, int]:
        """Predictions for each training item that are not trained, by what they are for."""
        return {}

    def drawn_steps(self) -> int:
        """Sampling steps of a picture that are drawn without a graph."""
        return self.num_inference_steps

    def passes(self) -> int:
        """How often a rollout is gone through."""
        return 1

    def encoded_pictures(self) -> int:
        """Pictures that the VAE encodes for each prompt."""
        return 0

    def work(self) -> Work:
        items = self.items_per_rollout() * self.passes()
        pictures, prompts = self.prompts_per_rollout * self.num_generations / items, self.prompts_per_rollout / items
        others = {part: calls * self.trained_rows for part, calls in self.network_calls().items()}
        encoded = {"encode": prompts * self.encoded_pictures()} if self.encoded_pictures() else {}
        return Work(
            "item",
            trained=self.trained_rows,
            forward={"rollouts": pictures * self.drawn_steps() * self.guided_rows, **others},
            vae={"decode": pictures, **encoded},
            prompts=prompts,
        )

    def plan(self, world_size: int = 1) -> PlanNotes:
        prompts, each = self.prompts_per_rollout, self.num_generations
        used = self.per_device_train_batch_size * self.gradient_accumulation_steps
        rollouts = {
            "pictures": f"{prompts * each} = {prompts} prompts x {each}, per device",
            "training items": f"{'' if self.knows_items() else 'at most '}{self.items_per_rollout()} a rollout, "
            f"{used} an optimiser step",
        }
        return PlanNotes({"rollouts": rollouts, **super().plan(world_size).sections})


@dataclass(frozen=True, kw_only=True)
class RenoisingConfig(DrawnTimes, RolloutConfig):
    """What the methods share that train on their own pictures at random noise levels."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Stepping, RolloutConfig):
    """Policy gradient on the sampler's steps (DDPO 2305.13301, with GRPO's group-relative advantages 2402.03300)."""

    method: ClassVar[str] = "grpo"

    num_iterations: Positive = 1
    """Passes over a rollout."""
    clip_range: PositiveFloat = 1e-4
    """Clip of the probability ratio; log-probabilities are means over latent values."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """What becomes of a micro-batch's losses; the sum is PrefPaint's."""
    kl_beta: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the reference."""
    kl_target: NonNegativeFloat = 0.0
    """Above 0: kl_beta is adapted after every rollout so that the divergence stays near this."""
    trust: Literal["none", "prefpaint", "mahalanobis"] = "none"
    """Weigh pictures by how far the reward can be trusted on them (one scorer, with features)."""
    trust_dataset: str | None = None
    """Judged pairs that the scorer was trained on (prefpaint: rated repaintings): what its features are compared
    with."""

    def items_per_rollout(self) -> int:
        steps = self.num_inference_steps if self.train_steps == "all" else self.train_steps
        return super().items_per_rollout() * steps

    def network_calls(self) -> dict[str, int]:
        return {"reference": 1} if self.kl_beta or self.kl_target else {}

    def drawn_steps(self) -> int:
        trained = self.num_inference_steps if self.train_steps == "all" else self.train_steps
        return self.num_inference_steps - trained if self.fused_rollouts else self.num_inference_steps

    def passes(self) -> int:
        return self.num_iterations

    def knows_items(self) -> bool:
        return self.train_steps != "all"  # how many steps have noise is the model's affair

    def counts_hole_only(self) -> bool:
        """Whether log-probabilities are means over the hole of an inpainting model."""
        return False

    def check(self) -> None:
        self.check_noise()
        if self.fused_rollouts and self.zero_advantage == "skip":
            raise ValueError("fused_rollouts keeps the graph of all pictures: zero_advantage must be keep, not skip")
        super().check()
        if self.trust != "none" and len(self.scorers) > 1:
            raise ValueError(f"trust {self.trust} needs one scorer with features, scorers has {len(self.scorers)}")

    def check_updates(self, items: int) -> None:
        if not self.fused_rollouts:
            super().check_updates(items)
            return
        if self.num_iterations > 1:
            raise ValueError(
                f"fused_rollouts updates on the graph that drew the pictures, once: num_iterations = "
                f"{self.num_iterations} needs fused_rollouts false"
            )
        if self.per_device_train_batch_size != items:
            raise ValueError(
                f"fused_rollouts trains on a whole rollout at once: per_device_train_batch_size must be its {items} "
                f"training items, not {self.per_device_train_batch_size} (for larger updates accumulate several "
                "rollouts with gradient_accumulation_steps)"
            )
        if self.lora_dropout:
            raise ValueError(
                "fused_rollouts trains on the sampler's forward pass, which has no dropout: lora_dropout > 0"
            )


@dataclass(frozen=True, kw_only=True)
class InpaintRLConfig(GRPOConfig):
    """Reinforcement learning of inpainting models with a reward-trust weight (PrefPaint, 2410.21966)."""

    method: ClassVar[str] = "inpaint-rl"

    model: str = "scenes-inpaint"
    """Shipped name, pipeline folder, single .safetensors file, or hub name of an inpainting model."""
    dataset: str = "scenes-holes"
    """scenes-holes, scenes-objects, or a folder of pictures (metadata.jsonl may give caption and mask)."""
    trust: Literal["none", "prefpaint", "mahalanobis"] = "mahalanobis"
    """Weigh pictures by how far the reward can be trusted on them (one scorer, with features)."""
    masked_log_prob: bool = True
    """Average log-probabilities over the hole only; false: over all latents, as published."""

    def counts_hole_only(self) -> bool:
        return self.masked_log_prob

    def encoded_pictures(self) -> int:
        return 1  # the picture without what is in the hole


@dataclass(frozen=True, kw_only=True)
class NFTConfig(RenoisingConfig):
    """DiffusionNFT (2509.16117): reward-weighted denoising of own pictures; no likelihood, any sampler."""

    method: ClassVar[str] = "nft"

    nft_beta: PositiveFloat = 1.0
    """How far the implicit positive policy lies from the old one towards the trained one."""
    updates_per_picture: Positive = 2
    """Noise levels each picture is trained at."""
    old_decay: NonNegativeFloat = 0.5
    """Largest decay of the average of policies that draws the pictures; it grows with the rollouts."""
    old_decay_growth: NonNegativeFloat = 0.01
    """By how much the decay grows per rollout."""
    kl_beta: NonNegativeFloat = 0.0
    """Weight of the squared distance to the reference's predictions."""
    space: Literal["output", "x0"] = "output"
    """Errors are those of the network's output, or of the clean latents that follow from it, times advantage_clip (the
    official code: other weights of the timesteps)."""

    def items_per_rollout(self) -> int:
        return super().items_per_rollout() * self.updates_per_picture

    def network_calls(self) -> dict[str, int]:
        return {"old policy": 1} | ({"reference": 1} if self.kl_beta else {})

    def memory_needs(self) -> MemoryNeeds:
        return replace(super().memory_needs(), copies=1)


@dataclass(frozen=True, kw_only=True)
class RAFTConfig(Keeping, RenoisingConfig):
    """Reward-ranked fine-tuning (2304.06767): draw several, keep the best of each prompt, denoise those; again."""

    method: ClassVar[str] = "raft"

    updates_per_picture: Positive = 4
    """Noise levels each kept picture is trained at."""
    kl_beta: NonNegativeFloat = 0.0
    """Weight of the squared distance to the reference's predictions."""

    def items_per_rollout(self) -> int:
        return self.prompts_per_rollout * self.most_kept(self.num_generations) * self.updates_per_picture

    @property
    def trained_rows(self) -> int:
        return 1  # the model itself is trained, not its guided prediction

    def network_calls(self) -> dict[str, int]:
        return {"reference": 1} if self.kl_beta else {}

    def check(self) -> None:
        self.check_keeping(self.num_generations, self.zero_advantage)
        super().check()
