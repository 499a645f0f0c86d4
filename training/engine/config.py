"""Settings that every run of the training loop shares, and the types of settings.

A field's comment is the command line's help and the docs' table. Names follow TRL and diffusers. Nothing heavy is
imported by any config, so that ``diffusion-align train dpo --help`` is instant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from diffusion_align.names import nearest

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
#: Of diffusers.optimization.
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


#: What other programs call settings, where the names are too unlike to be found.
USUAL_NAMES: Mapping[str, str] = MappingProxyType({
    "lr": "learning_rate", "lr_warmup_steps": "warmup_steps", "optimizer": "optim", "beta_dpo": "beta",
    "batch_size": "per_device_train_batch_size", "train_batch_size": "per_device_train_batch_size",
    "steps": "max_steps", "max_train_steps": "max_steps", "num_train_epochs": "max_steps", "epochs": "max_steps",
    "rank": "lora_rank", "network_dim": "lora_rank", "network_alpha": "lora_alpha", "out": "output_dir",
    "pretrained_model_name_or_path": "model", "train_data_dir": "dataset", "data": "dataset", "prompts": "dataset",
    "fp16": "mixed_precision", "bf16": "mixed_precision", "max_samples": "max_pairs", "reward": "scorers",
})  # fmt: skip


def nearest_setting(name: str, known: Collection[str]) -> str | None:
    """The setting that ``name`` was probably meant for, e.g. learning_rate for lr; None: none is near."""
    if USUAL_NAMES.get(name) in known:
        return USUAL_NAMES[name]
    return nearest(name, sorted(known))


@dataclass(frozen=True)
class PlanNotes:
    """What a dry run says about a run, beside its settings and steps.

    Attributes:
        sections: by title, a text or rows of name and value.
        examples: how many examples the data set has; None where that is not known.
    """

    sections: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)
    examples: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run of the training loop shares, whatever it trains."""

    #: The name in training/methods.py.
    method: ClassVar[str]
    #: Settings, of this class's own, with which a resumed run may differ from the checkpoint's; they are applied.
    changeable: ClassVar[frozenset[str]] = frozenset({
        "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon",
        "weight_decay", "max_grad_norm", "ema_decay", "save_steps", "save_total_limit", "logging_steps", "report_to",
        "eval_steps", "early_stopping_patience", "metric_for_best_model",
    })  # fmt: skip
    #: Settings, of this class's own, that whoever repeats a run must ask for again: a run's config.yaml has their
    #: defaults.
    once: ClassVar[frozenset[str]] = frozenset({
        "config", "dry_run", "card", "resume_from_checkpoint", "overwrite_output_dir",
    })  # fmt: skip
    #: Whether ``train`` may be given a loaded scorer to learn from, and a loaded diffusion model.
    takes_scorer: ClassVar[bool] = False
    takes_model: ClassVar[bool] = True

    def __new__(cls, *values: Any, **settings: Any) -> Self:
        """Before the fields are filled: a name that is none of them is met with the nearest one.

        Raises:
            TypeError: an unknown setting.
        """
        known = {each.name for each in fields(cls)}
        for name in settings:
            if name not in known:
                near = nearest_setting(name, known)
                hint = f": did you mean {near!r}?" if near else f", whose settings are {', '.join(sorted(known))}"
                raise TypeError(f"{name!r} is no setting of {cls.__name__}{hint}")
        return super().__new__(cls)

    config: str | None = None
    """YAML recipe, or the config.yaml of an earlier run; flags override it."""
    dry_run: bool = False
    """Print the plan (resolved config, data counts, memory, disk, operations, steps) and stop."""
    card: str | None = None
    """With dry_run: estimate the hours on this card: 4090, a100, h100, h200, l40s, or tflops:N for one that does N
    TFLOP/s in a step; 8xh100 means eight."""

    # -- optimisation
    max_steps: Positive = 2000
    """Optimiser steps."""
    per_device_train_batch_size: Positive = 1
    """Examples (pairs, prompts, pictures) per device and micro-step."""
    gradient_accumulation_steps: Positive = 1
    """Micro-steps per optimiser step."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate."""
    lr_scheduler_type: Schedule = "constant_with_warmup"
    """Schedule of the learning rate (diffusers.optimization)."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up."""
    optim: Literal["adamw", "adamw_8bit", "adafactor", "adafactor_scaled"] = "adamw"
    """Optimiser: fused AdamW, bitsandbytes' 8-bit AdamW, Adafactor with the given rate, or torch's Adafactor, whose
    rate is multiplied by the size of each parameter."""
    adam_beta1: Fraction = 0.9
    """AdamW's first decay."""
    adam_beta2: Fraction = 0.999
    """AdamW's second decay."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 1e-2
    """Weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    use_ema: bool = False
    """Keep an exponential average of the trained weights; it is what is validated and saved."""
    ema_decay: Fraction = 0.9999
    """Decay of that average."""
    seed: int = 0
    """Seed of the run; every sample's noise, timestep and augmentation follow from it and the sample's position."""
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = "no"
    """Autocast of the forward pass; LoRA weights and optimiser states stay float32. auto is bf16 where the device
    computes it in hardware, else no."""

    # -- the run
    output_dir: str = "runs/train"
    """Folder of weights, checkpoints, metrics, pictures and config.yaml."""
    overwrite_output_dir: bool = False
    """Start again even if output_dir holds checkpoints (they are deleted)."""
    resume_from_checkpoint: str | None = None
    """"latest" (of output_dir), a checkpoint folder, or a run folder."""
    save_steps: Positive = 200
    """Steps between checkpoints."""
    save_total_limit: Positive = 2
    """Checkpoints kept."""
    logging_steps: Positive = 10
    """Steps between log lines; metrics are averaged over them."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Tracker, besides metrics.jsonl."""
    progress: bool = True
    """Show a progress bar."""
    eval_steps: NonNegative = 0
    """Steps between validations against the base on fixed prompts and seeds; 0 switches it off."""
    early_stopping_patience: NonNegative = 0
    """Stop after this many validations in a row without a new best."""
    metric_for_best_model: str = "eval/reward"
    """Metric of validation (larger is better). The weights with its best value are kept in output_dir/best; early
    stopping watches it."""

    @property
    def best_metric(self) -> str:
        """The metric whose best value's weights are kept."""
        return self.metric_for_best_model

    def check(self) -> None:
        """Whether the settings fit each other, as far as they tell without model and data.

        Raises:
            ValueError: they do not; the message names them.
        """
        if self.card is not None:
            self._check_card(self.card)

    def _check_card(self, name: str) -> None:
        from diffusion_align.hardware import find_card

        find_card(name)
        if not self.dry_run:
            raise ValueError(
                f"card {name!r} is what a plan is made for: it needs dry_run, training takes what is there"
            )

    def savings(self) -> tuple[Mapping[str, Any], ...]:
        """Changes of settings with which the same is learnt in less memory, those that usually help most first."""
        found: list[Mapping[str, Any]] = []
        if self.per_device_train_batch_size > 1:
            half = -(-self.per_device_train_batch_size // 2)
            steps = 2 * self.gradient_accumulation_steps
            found.append({"per_device_train_batch_size": half, "gradient_accumulation_steps": steps})
        if self.mixed_precision == "no":
            found.append({"mixed_precision": "bf16"})
        if self.optim == "adamw":
            found.append({"optim": "adamw_8bit"})
        if self.use_ema:
            found.append({"use_ema": False})
        return tuple(found)

    def next_commands(self) -> list[list[str]]:
        """Arguments of the commands that whoever made the run is likely to want next."""
        return []

    def memory_bytes(self) -> int | None:
        """Estimate of a run's peak on one device; None where there is none.

        Raises:
            OSError: as ``plan``.
        """
        return None

    def plan(self, world_size: int = 1) -> PlanNotes:
        """What ``--dry-run`` says about this run on ``world_size`` devices; nothing is trained.

        Raises:
            ValueError, FileNotFoundError, OSError: data or model that cannot be read.
        """
        return PlanNotes()


@dataclass(frozen=True, kw_only=True)
class JudgeRun(RunConfig):
    """Settings of runs that train small judges, scorers and evaluators, from nothing."""

    lr_scheduler_type: Schedule = "cosine"
    """Schedule of the learning rate (diffusers.optimization)."""
    warmup_steps: NonNegative = 100
    """Steps of linear warm-up."""
