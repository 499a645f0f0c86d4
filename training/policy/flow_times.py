"""At which times flow models are trained, and what they are told of guidance: settings, and the draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffusion_align.training.engine.config import Fraction, NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffusion_align.adapters import Adapter

#: Settings of models with timesteps, which flow models have not.
OF_TIMESTEPS = (
    "min_timestep", "max_timestep", "timesteps", "timestep_density", "timestep_logit_mean", "timestep_logit_std",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TimeRange:
    """Of flow models (SD3, FLUX): the range of times that are trained at."""

    min_time: Fraction = 0.0
    """Flow models: smallest training time sigma, the share of noise, from 0 (the picture) to 1 (noise)."""
    max_time: Fraction = 1.0
    """Flow models: largest training time."""


@dataclass(frozen=True, kw_only=True)
class DrawnTimes(TimeRange):
    """Of flow models: how training times are drawn from it."""

    time_density: Literal["logit-normal", "uniform"] = "logit-normal"
    """Flow models: how times are drawn before the shift; logit-normal: logit(sigma) is a normal number (SD3)."""
    time_logit_mean: float = 0.0
    """Flow models: mean of that number; above 0 is more noise (diffusers' scripts count the other way)."""
    time_logit_std: PositiveFloat = 1.0
    """Flow models: its standard deviation."""
    shift: PositiveFloat | Literal["auto"] = "auto"
    """Flow models: moves times to more noise, as the sampler does: s sigma / (1 + (s - 1) sigma). auto is the
    pipeline's own: 3 of SD3, of FLUX dev by the picture's size; 1 is none."""
    allow_distilled: bool = False
    """Train a model that was distilled to a few steps (FLUX schnell) on noisy pictures, which unlearns that."""


@dataclass(frozen=True, kw_only=True)
class FlowTimes(DrawnTimes):
    """Of flow models, for training on data sets."""

    train_guidance: NonNegativeFloat = 1.0
    """FLUX dev: the guidance scale that the network is told in training on data sets; 1 keeps its distilled guidance
    as it is."""


#: Settings of flow models, which others have not.
OF_FLOW = tuple(field.name for field in dataclasses.fields(FlowTimes))


def changed(config: Any, names: Sequence[str]) -> list[str]:
    """Which of these settings of ``config`` are there and not what they are by default."""
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    return [name for name in names if name in usual and getattr(config, name) != usual[name]]


def check_time_range(config: Any, adapter: Adapter) -> None:
    """Whether the settings of times are those of the model's kind.

    Args:
        config: with the settings of ``TimeRange``.

    Raises:
        ValueError: settings of the other kind of model are set, or the range is empty.
    """
    straight = adapter.path.straight
    wrong = changed(config, OF_TIMESTEPS if straight else OF_FLOW)
    if wrong and straight:
        raise ValueError(
            f"{wrong[0]} is for models with timesteps, and {config.model} is of flow matching: set min_time, max_time "
            "and time_density instead"
        )
    if wrong:
        raise ValueError(
            f"{wrong[0]} is for flow models (SD3, FLUX), and {config.model} has timesteps: set min_timestep, "
            "max_timestep and timestep_density instead"
        )
    if config.min_time >= config.max_time:
        raise ValueError(f"min_time = {config.min_time:g} must be smaller than max_time = {config.max_time:g}")


def check_drawn_times(config: Any, adapter: Adapter) -> None:
    """Whether the model can be trained on noisy pictures at the times of the settings.

    Args:
        config: with the settings of ``DrawnTimes``.

    Raises:
        ValueError: as ``check_time_range``, or the model was distilled to a few steps.
    """
    check_time_range(config, adapter)
    if adapter.path.straight and adapter.guidance == "none" and not config.allow_distilled:
        raise ValueError(
            f"{config.model} was distilled to a few steps, which training on noisy pictures unlearns: train its base "
            "model, or set allow_distilled"
        )


def check_time_settings(config: Any, adapter: Adapter) -> None:
    """Whether the settings of ``FlowTimes`` fit the model.

    Raises:
        ValueError: as ``check_drawn_times``, or a guidance scale for a model that takes none.
    """
    check_drawn_times(config, adapter)
    if config.train_guidance != FlowTimes.train_guidance and not adapter.embeds_guidance:
        raise ValueError(
            f"train_guidance = {config.train_guidance:g} is for models that take the guidance scale as an input (FLUX "
            f"dev), and {config.model} does not: leave it unset"
        )


def draw_flow_times(
    config: DrawnTimes, adapter: Adapter, generators: Sequence[torch.Generator], height: int, width: int
) -> Tensor:
    """Training times (B,) float32 of a flow model, one from each CPU generator.

    Args:
        height, width: of the latents, whose number of tokens a dynamic shift depends on.
    """
    from diffusion_align.process import FlowMatching, TimeDensity

    path = adapter.path
    assert isinstance(path, FlowMatching)
    density = TimeDensity(
        config.time_density, config.time_logit_mean, config.time_logit_std, config.min_time, config.max_time
    )
    if config.shift == "auto":
        return density.draw(generators, path.shift.offset(adapter.family.tokens(height, width)))
    return density.draw(generators, math.log(config.shift))
