"""Settings of preference losses, which learning from given pairs and from own pictures share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusion_align.objectives.declared import declared
from diffusion_align.training.engine.config import Fraction, NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    LossType = str
    ListLossType = str
else:
    LossType = Literal[declared("pair_loss")]
    ListLossType = Literal[declared("list_loss")]


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """A loss on pairs, several that are added up, or one on lists; and what goes with it."""

    #: Settings that a loss on lists would ignore.
    for_pairs: ClassVar[tuple[str, ...]] = ("label_smoothing", "loss_weights", "safeguard_mu", "score_target")
    #: Options, and the losses that have them.
    options: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({
        "score_target": ("ipo",), "lair_lambda": ("lair",), "d2o_alpha": ("d2o",), "list_advantage": ("lair", "dgpo"),
    })  # fmt: skip

    # -- objective
    loss_type: LossType | ListLossType | tuple[LossType, ...] = "sigmoid"
    """Preference loss (docs/dpo.md has the table), or several on pairs, which are added up, e.g. sigmoid bco_pair sft.
    Losses on lists also take pairs, as lists of two."""
    loss_weights: tuple[PositiveFloat, ...] = ()
    """A factor for each of several losses, e.g. 0.8 0.2 1; unset: 1 for all."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of an added denoising loss on the chosen images."""
    safeguard_mu: Fraction | None = None
    """Diffusion-SDPO (2511.03317): weaken the rejected image's gradient so that the chosen one's error does not rise:
    by (1 - safeguard_mu) / kappa, at most 1, with the metric kappa. Published: 0.9 for SD 1.5, 0.6 for SDXL. Unset:
    off."""
    safeguard: Literal["sample", "batch"] = "sample"
    """Whether safeguard_mu weighs each pair by itself, or has one factor for a micro-batch (the published code)."""
    score_target: PositiveFloat | None = None
    """Of ipo, where there are scores: u is brought to this times their difference, instead of 1/2 (CaPO)."""
    list_advantage: Literal["win_rate", "standardised", "score"] | None = None
    """Of lair and dgpo: how much better a picture is than its list: the share of it that it beats, its score (or rank)
    over the list's deviation, or its score minus the list's mean. Unset: win_rate for lair, standardised for dgpo."""
    lair_lambda: PositiveFloat | None = None
    """Of lair: rewards are brought to advantage / lair_lambda (its own: 1)."""
    d2o_alpha: PositiveFloat | None = None
    """Of d2o: weight of the bad pictures (its own: 1)."""

    @property
    def loss_types(self) -> tuple[str, ...]:
        """All losses, also if it is one."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def is_list(self) -> bool:
        """Whether the loss is one on lists."""
        return self.loss_type in declared("list_loss")

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is asked at all."""
        from diffusion_align.objectives.preference import PREFERENCE_LOSSES

        return self.is_list or any(PREFERENCE_LOSSES[name].needs_reference for name in self.loss_types)

    def list_options(self) -> tuple[str, dict[str, Any]]:
        """How a loss on lists measures advantages, and the options of it that are set."""
        from diffusion_align.objectives.one_signature import LIST_LOSSES

        table = LIST_LOSSES[self.loss_types[0]]
        given = {name: getattr(self, name) for name in table.options}
        chosen = {name: value for name, value in given.items() if value is not None}
        return self.list_advantage or table.advantage or "win_rate", chosen

    def check_loss(self) -> None:
        """Raises ValueError where the loss would ignore a setting, or losses and weights are not equally many."""
        named = ", ".join(self.loss_types)
        defaults = {name: field.default for name, field in type(self).__dataclass_fields__.items()}
        for name in self.for_pairs if self.is_list else ():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is for losses on pairs: loss_type {named} takes lists")
        for name, losses in self.options.items():
            if getattr(self, name) is not None and not set(losses) & set(self.loss_types):
                raise ValueError(f"{name} is an option of loss_type {' and '.join(losses)}, found {named}")
        if self.loss_weights and len(self.loss_weights) != len(self.loss_types):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers for the {len(self.loss_types)} losses of "
                "loss_type: expected one for each"
            )
