"""Settings that every method that trains a diffusion model shares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from diffusion_align.training.engine.config import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    PlanNotes,
    Positive,
    PositiveFloat,
    RunConfig,
)

from .model_options import TrainedModelOptions
from .watching.watch_limits import LEAST_HELD_OUT, LEAST_PROMPTS

#: What may stop a run, by the name of its rule (docs/diagnostics.md).
StopRule = Literal["alarm", "artefacts", "held_out", "kl_budget", "spread", "entanglement", "large_margins"]


@dataclass(frozen=True)
class ValidationData:
    """What policy and base are compared on.

    Attributes:
        dataset: whose validation split gives the prompts where no file does; None: a file must.
        mask_kinds: random masks of what an inpainting model repaints; empty: it is given no holes.
        resolution: side of those pictures in pixels; None is the model's own.
    """

    dataset: str | None = None
    mask_kinds: tuple[Literal["box", "brush", "half", "border"], ...] = ()
    resolution: int | None = None


@dataclass(frozen=True)
class VAEJob:
    """What a training step needs from the VAE: to code this many pictures; decoded ones may keep a graph."""

    kind: Literal["encode", "decode", "decode_with_graph"]
    pictures: int


@dataclass(frozen=True)
class MemoryNeeds:
    """What the memory of a run depends on, beside its weights and its optimiser.

    Attributes:
        resolution: side of the pictures in pixels; None is the model's own.
        cached: latents and prompt embeddings are read from disk.
        rows: of the network's batch, for each example of a training batch.
        passes: forward passes whose activations are kept together.
        vae_jobs: the VAE's, in training.
        vae_in_backward: whether the VAE works while the activations are kept.
        copies: of the trained weights, beside themselves.
    """

    resolution: int | None = None
    cached: bool = False
    rows: int = 2
    passes: int = 1
    vae_jobs: tuple[VAEJob, ...] = ()
    vae_in_backward: bool = False
    copies: int = 0


@dataclass(frozen=True)
class Work:
    """What training on one example takes, in rows of the network (one picture, one call) and pictures of the VAE.

    Attributes:
        name: of an example.
        trained: rows that go forward and backward.
        forward: rows that only go forward, by what they are for.
        vae: pictures, by the kind of ``VAEJob``.
        prompts: that the text encoders read.
    """

    name: str = "example"
    trained: float = 2
    forward: Mapping[str, float] = field(default_factory=dict)
    vae: Mapping[str, float] = field(default_factory=dict)
    prompts: float = 1


@dataclass(frozen=True)
class CachedExample:
    """What a cache of latents holds of an example.

    Attributes:
        pictures: how many.
        versions: of each: 2 with its mirror image.
        is_there: whether the run finds its cache made.
    """

    pictures: int
    versions: int
    is_there: bool


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainedModelOptions, RunConfig):
    """What every method that trains a diffusion model shares."""

    changeable: ClassVar[frozenset[str]] = frozenset({
        "gradient_checkpointing", "torch_compile", "channels_last", "vae_batch_size", "validation_prompts",
        "num_validation_prompts", "validation_scorer", "validation_inference_steps", "validation_guidance_scale",
        "validation_seed", "validation_seeds_per_prompt", "final_pictures", "held_out_scorers",
        "kl_prompts", "kl_budget", "stop_on", "timestep_bins", "artefact_monitor", "push_to_hub",
        "hub_model_id",
    })  # fmt: skip

    once: ClassVar[frozenset[str]] = frozenset({"push_to_hub", "hub_model_id"})

    #: Rules that a run of this method has.
    stop_rules: ClassVar[frozenset[str]] = frozenset({"alarm", "artefacts", "held_out", "kl_budget"})

    #: Settings that are guidance scales of pictures.
    guidance_settings: ClassVar[tuple[str, ...]] = ("validation_guidance_scale",)

    # -- model
    init_weights: str | None = None
    """LoRA (any usual layout; PATH:WEIGHT scales it), run or UNet folder, folded into the base before training, e.g. an
    SFT run. It belongs to the reference, and a LoRA also to the files that the run writes."""

    # -- policy
    full_finetuning: bool = False
    """Train all UNet weights against a frozen copy, instead of a LoRA whose reference is the UNet without it."""
    lora_rank: Positive = 8
    """Rank of the LoRA matrices."""
    lora_alpha: PositiveFloat | None = None
    """LoRA scale is alpha / rank; unset means alpha = rank."""
    lora_dropout: Fraction = 0.0
    """Dropout on the LoRA input."""
    lora_init: Literal["kaiming", "gaussian"] = "kaiming"
    """How the LoRA's first matrices start: as peft's (uniform, by the layer's width), or as in diffusers' scripts
    (normal, deviation 1 / rank)."""
    lora_target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Suffixes of the modules that get a LoRA; those of a UNet stand for a transformer's own (docs/lora.md)."""

    # -- speed and memory
    gradient_checkpointing: Literal["none", "attention", "full"] = "none"
    """Recompute activations in the backward pass: nowhere, in the transformer layers, everywhere."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention kernels."""
    torch_compile: bool = False
    """Compile each transformer block of the UNet (torch.compile)."""
    channels_last: bool = False
    """Channels-last memory format of the UNet."""

    # -- validation
    validation_prompts: str | None = None
    """File of prompts (.txt, .csv, .jsonl, .parquet); unset takes captions of the validation split."""
    num_validation_prompts: Positive = 64
    """Number of prompts."""
    validation_scorer: str | None = None
    """Scorer that compares policy and base, e.g. scenes-oracle; unset saves pictures only."""
    validation_inference_steps: Positive = 20
    """Sampling steps."""
    validation_guidance_scale: NonNegativeFloat = 5.0
    """Classifier-free guidance scale."""
    validation_seed: int = 1234
    """Image i is drawn with this seed + i."""
    validation_seeds_per_prompt: Positive = 1
    """Pictures of each prompt; from 2 on, their diversity is compared with the base's, and each prompt counts with the
    mean of its rewards."""
    held_out_scorers: tuple[str, ...] = ()
    """Scorers that are only watched in validation (eval/NAME), e.g. scenes-oracle: a reward that rises while these
    fall is over-optimised."""

    final_pictures: NonNegative = 6
    """Without eval_steps: prompts that base and trained model draw at the end of `diffusion-align train`, into samples/
    and the report; 0: none. (`train()` in Python draws none.)"""

    # -- sharing
    push_to_hub: bool = False
    """At the end send weights, model card, gallery and settings to hub_model_id, as diffusion-align push does:
    private."""
    hub_model_id: str | None = None
    """With push_to_hub: repository of the hub, USER/NAME."""

    # -- watching
    kl_prompts: NonNegative = 0
    """Validation prompts along whose sampling the divergence from the base is measured (eval/kl); 0 does without, which
    saves drawing them once more."""
    kl_budget: PositiveFloat | None = None
    """Largest eval/kl, in nats a picture, before there is an alarm."""
    timestep_bins: NonNegative = 5
    """Figures are logged for this many equal ranges of timesteps as well (NAME/t0-199); 0 switches it off."""
    artefact_monitor: bool = False
    """Measure more of the validation pictures (BRISQUE if it is installed, blockiness, energy of high frequencies, near
    duplicates), log artefact/NAME with its 99% interval, and raise the alarm artefacts where a paired interval leaves
    what may be at two validations in a row; without it one validation and the base's own spread decide."""
    stop_on: tuple[StopRule, ...] = ()
    """Alarms that stop the run; alarm is any of them, and unset only says and logs them."""

    @property
    def best_metric(self) -> str:
        unset = self.metric_for_best_model == RunConfig.metric_for_best_model
        watched = len(self.held_out_scorers) >= LEAST_HELD_OUT and not {"alarm", "held_out"}.isdisjoint(self.stop_on)
        return "eval/held_out" if unset and watched else self.metric_for_best_model

    def check(self) -> None:
        super().check()
        self._check_watching()
        if self.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub_model_id or ""):
            raise ValueError(f"push_to_hub needs hub_model_id, USER/NAME of a repository; it is {self.hub_model_id!r}")
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError(f"hub_model_id {self.hub_model_id} is for push_to_hub, which is not set")
        if self.full_finetuning and self.weight_dtype != "fp32" and self.mixed_precision == "no":
            raise ValueError(
                f"weight_dtype {self.weight_dtype} with full_finetuning needs mixed_precision fp16 or bf16: the "
                "reference is stored in it, the trained weights are float32"
            )
        if self.eval_steps and self.validation_prompts is None and self.validation_data().dataset is None:
            raise ValueError(f"eval_steps = {self.eval_steps} needs validation_prompts, a file with one prompt a line")

    def _check_watching(self) -> None:
        wrong = [name for name in self.stop_on if name not in self.stop_rules]
        if wrong:
            raise ValueError(
                f"stop_on has {wrong[0]}, which {self.method} does not watch: expected some of "
                f"{', '.join(sorted(self.stop_rules))}"
            )
        needs = {
            "held_out": (len(self.held_out_scorers) >= LEAST_HELD_OUT, f"at least {LEAST_HELD_OUT} held_out_scorers"),
            "kl_budget": (self.kl_budget is not None, "a kl_budget"),
            "artefacts": (
                self.num_validation_prompts >= LEAST_PROMPTS,
                f"num_validation_prompts of at least {LEAST_PROMPTS}",
            ),
        }
        for name, (is_there, what) in needs.items():
            if name in self.stop_on and not is_there:
                raise ValueError(f"stop_on {name} needs {what}")
            if name in self.stop_on and not self.eval_steps:
                raise ValueError(f"stop_on {name} needs validation: set eval_steps")
        if self.artefact_monitor and not (self.eval_steps and self.num_validation_prompts >= LEAST_PROMPTS):
            raise ValueError(
                f"artefact_monitor needs eval_steps, and num_validation_prompts of at least {LEAST_PROMPTS}"
            )
        if self.kl_budget is not None and not (self.kl_prompts and self.eval_steps):
            raise ValueError(f"kl_budget = {self.kl_budget:g} needs kl_prompts, e.g. 8, and eval_steps")

    def validation_data(self) -> ValidationData:
        """What policy and base are compared on."""
        return ValidationData()

    def guided_by(self, guidance: Literal["cfg", "embedded", "none"]) -> Self:
        """The settings as costs are counted for a model that is guided so (``Family.guidance``): only "cfg" takes two
        predictions above scale 1."""
        unguided: dict[str, Any] = dict.fromkeys(self.guidance_settings, 1.0)
        return self if guidance == "cfg" else replace(self, **unguided)

    def counted(self) -> Self:
        """``guided_by`` the model that the settings name; as they are where its configs cannot be read, or nothing
        depends on it."""
        from diffusion_align.shipped import SHIPPED_MODELS

        if self.model in SHIPPED_MODELS or self.guided_by("none").work() == self.work():
            return self
        from .costs.meta_model import guidance_of

        try:
            return self.guided_by(guidance_of(self))
        except (OSError, ValueError):
            return self

    def memory_needs(self) -> MemoryNeeds:
        """What the memory of the run depends on, beside its weights and its optimiser."""
        return MemoryNeeds()

    def savings(self) -> tuple[Mapping[str, Any], ...]:
        found: list[Mapping[str, Any]] = []
        if self.gradient_checkpointing != "full":
            found.append({"gradient_checkpointing": "full"})
        found += super().savings()
        if self.weight_dtype == "fp32" and not self.full_finetuning:
            found.append({"weight_dtype": "bf16"})
        if self.vae_batch_size != 1:
            found.append({"vae_batch_size": 1})
        if not self.full_finetuning and self.lora_rank > 1:
            found.append({"lora_rank": self.lora_rank // 2})
        return tuple(found)

    def next_commands(self) -> list[list[str]]:
        drawn = ["generate", "a prompt of yours", *self.model_flags(), "--lora", self.output_dir]
        return [drawn, ["evaluate", "base", self.output_dir]]

    def memory_bytes(self) -> int | None:
        from .costs.memory import estimate_memory

        try:
            return estimate_memory(self).total
        except (OSError, ValueError):  # the configs of a single file, for example, may not be here
            return None

    def work(self) -> Work:
        """What training on one example takes."""
        return Work()

    def cached_example(self) -> CachedExample | None:
        """What a cache of latents holds of an example; None: the method has no such cache."""
        return None

    @property
    def compute_dtype(self) -> Literal["fp32", "fp16", "bf16"]:
        """What the network computes in, where the device has it."""
        return {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "auto": "bf16"}[self.mixed_precision]  # type: ignore[return-value]

    def plan(self, world_size: int = 1) -> PlanNotes:
        return PlanNotes(self.costs(world_size))

    def costs(self, world_size: int = 1, examples: int | None = None) -> dict[str, str | Mapping[str, str]]:
        """Memory, disk, operations and, with ``card``, hours, for reading.

        Args:
            examples: how many the data set has; None where that is not known.

        Raises:
            ValueError, OSError: as ``build_meta_model``.
        """
        from diffusion_align.hardware import find_card

        from .costs.compute import card_rows, estimate_compute
        from .costs.disk import disk_rows
        from .costs.memory import GIB, estimate_memory
        from .costs.meta_model import build_meta_model

        model = build_meta_model(self)
        memory = estimate_memory(self, world_size, model)
        compute = estimate_compute(self, model, world_size, examples)
        sections: dict[str, str | Mapping[str, str]] = {
            "memory": memory.rows(),
            "disk": disk_rows(self, model, memory, examples),
            "operations": compute.rows(self.work().name),
        }
        if self.card is not None:
            card = find_card(self.card)
            sections["hours"] = card_rows(card, compute, self.compute_dtype, memory.total / GIB)
        return sections
