"""Settings that go with any loss of the pair methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from diffusion_align.training.engine.config import Fraction, Positive, PositiveFloat

if TYPE_CHECKING:
    from ..config import DenoisingConfig, DPOConfig, ReferencedConfig


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """At which noise levels is trained, and how much each counts."""

    timestep_density: Literal["uniform", "late", "logit-normal"] = "uniform"
    """How timesteps are drawn from [min_timestep, max_timestep): evenly; late, with a density that grows in proportion
    to the distance from min_timestep; or logit-normal, of the position in the range."""
    timestep_logit_mean: float = 0.0
    """Mean of the logit-normal density's normal number; above 0 is later."""
    timestep_logit_std: PositiveFloat = 1.0
    """Its standard deviation."""
    timestep_weight: Literal["none", "min-snr"] = "none"
    """Factor of an example's loss by its noise level: none, or min-snr (2303.09556) with min_snr_gamma."""
    min_snr_gamma: PositiveFloat = 5.0
    """The signal-to-noise ratio above which levels count the less; smaller values favour more noise."""


@dataclass(frozen=True, kw_only=True)
class ReferenceSwitches:
    """What the policy is compared with."""

    reference: Literal["frozen", "ema", "sync"] = "frozen"
    """What the policy is compared with: the model it began as; an average of its own weights that follows it (Linear-
    DPO); or its own weights of every reference_sync_steps (TR-DPO). The latter two need a LoRA."""
    reference_decay: Fraction = 0.99
    """With reference ema: share of the average that stays at each step."""
    reference_sync_steps: Positive = 512
    """With reference sync: steps between renewals."""
    reference_sync_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """With reference sync: share of the policy in the renewed reference."""
    watch_frozen: bool = True
    """With reference ema or sync: also ask the frozen model (one more forward pass a step), for frozen/margin,
    frozen/chosen_error_up and frozen/moved. The moving reference's own margin says nothing of the way from the base."""


@dataclass(frozen=True, kw_only=True)
class PairSwitches:
    """What can be switched on for any loss on pairs."""

    linear_eta: Fraction | None = None
    """Of linear: the least weight of a pair (its own: 0.001)."""
    pair_beta: PositiveFloat | None = None
    """SmPO (2506.02698): soft labels p weigh beta by pair_beta (2 p - 1), instead of entering the loss. The published
    code's is 10, at a tenth of the beta that a sure pair should have. Unset: off."""
    margin_dropout: Fraction = 0.0
    """Share of pairs, drawn anew at every visit, whose rejected image gives no gradient: only the chosen one is
    learned from."""
    swap_labels: bool | None = False
    """Learn the opposite: true for a negative model (Diffusion-NPO); null only where the caption was dropped
    (caption_dropout), so that the null prompt becomes the negative one (Diff-SNPO; with a bounded loss or
    safeguard_mu)."""
    curriculum: Literal["none", "label"] = "none"
    """Begin with the surest pairs, by soft label (Curriculum-DPO, 2405.13637), and add the next share of the data every
    curriculum_steps."""
    curriculum_chunks: Positive = 5
    """In how many shares."""
    curriculum_steps: Positive = 500
    """Steps before the next share is added."""


def check_levels(config: DenoisingConfig) -> None:
    """Raises ValueError where a density of timesteps does not fit the other settings."""
    if config.timestep_density != "uniform" and config.timestep_set:
        raise ValueError(
            f"timestep_density {config.timestep_density} needs a range of timesteps: timesteps names "
            f"{len(config.timestep_set)} of them, which are drawn evenly"
        )


def check_switches(config: DPOConfig) -> None:
    """Raises ValueError where a switch would do nothing, or cannot do what it says."""
    if config.loss_types == ("sft",) and (config.safeguard_mu is not None or config.margin_dropout):
        name = "safeguard_mu" if config.safeguard_mu is not None else "margin_dropout"
        raise ValueError(f"{name} weakens the rejected image, which loss_type sft does not look at")
    if config.reference != "frozen" and not config.needs_reference:
        raise ValueError(f"reference {config.reference}: loss_type {', '.join(config.loss_types)} has no reference")
    if config.is_list and config.reference_cache:
        raise ValueError(f"reference_cache remembers errors of pairs: loss_type {config.loss_type} takes lists")
    if config.swap_labels is None and not config.caption_dropout:
        raise ValueError("swap_labels null exchanges the pairs whose caption is dropped: set caption_dropout above 0")
    if config.reference != "frozen" and config.reference_cache:
        raise ValueError(
            f"reference_cache remembers what a frozen reference says, and reference {config.reference} moves: set one "
            "of them back"
        )
    if config.curriculum != "none":
        check_order(config, "curriculum orders all pairs")


def check_order(config: DenoisingConfig, wish: str) -> None:
    """Raises ValueError where the data could not have an order of their own, which ``wish`` says the reason of."""
    for name in ("streaming", "aspect_ratio_buckets"):
        if getattr(config, name) and not (name == "streaming" and config.cache_dir is not None):
            raise ValueError(f"{wish}, which {name} does not: set {name} to false")


def check_reference(config: ReferencedConfig) -> None:
    """Raises ValueError where the reference could not move."""
    if config.reference == "frozen":
        return
    if config.full_finetuning:
        raise ValueError(
            f"reference {config.reference} keeps a second set of the trained weights, which is small for a LoRA only: "
            "set full_finetuning to false"
        )
    if config.lora_dropout:
        raise ValueError(f"reference {config.reference} is asked without dropout: set lora_dropout to 0")
