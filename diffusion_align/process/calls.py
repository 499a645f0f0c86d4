"""Which calls of the denoiser belong to which sampling step: some schedulers call it more often than asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .levels import Level

#: Calls of a Runge-Kutta step, with which ``PNDMScheduler`` begins unless it skips them.
RUNGE_KUTTA = 4


@dataclass(frozen=True)
class Call:
    """One call of the denoiser.

    Attributes:
        step: the step that it belongs to, from 0.
        opens, closes: whether it is the first and the last call of its step.
    """

    step: int
    opens: bool = True
    closes: bool = True


def set_steps(scheduler: Any, steps: int, **options: Any) -> None:
    """``scheduler.set_timesteps(steps)``, on the CPU.

    Args:
        options: of flow schedulers, what the model's pipeline gives them: ``mu``, ``sigmas``.

    Raises:
        ValueError: the scheduler cannot make so few or so many.
    """
    try:
        scheduler.set_timesteps(steps, **options)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"num_inference_steps = {steps}: {type(scheduler).__name__} cannot make them ({error})"
        ) from error


def model_calls(scheduler: Any, steps: int | None = None) -> list[Call]:
    """The calls of a run, one for each of ``scheduler.timesteps``.

    A *step* is one of the steps that were asked for. Most schedulers call the denoiser once in each. Heun, KDPM2 and
    DPM++ SDE call it twice, but once in the last step (2 N - 1 calls). PNDM calls it twice in its first step (N + 1),
    or four times in each of its first three where it begins with Runge-Kutta (N + 9).

    Args:
        scheduler: a diffusers scheduler, after ``set_timesteps``.
        steps: how many were asked for; None is what the scheduler remembers.

    Raises:
        ValueError: the scheduler makes fewer calls than steps.
    """
    steps, count = steps or scheduler.num_inference_steps, len(scheduler.timesteps)
    if count < steps:
        raise ValueError(f"num_inference_steps = {steps}: {type(scheduler).__name__} makes {count} of them only")
    numbers = _numbers(scheduler, steps, count)
    return [
        Call(step, opens=step != before, closes=step != after)
        for before, step, after in zip([-1, *numbers[:-1]], numbers, [*numbers[1:], -1], strict=True)
    ]


def _numbers(scheduler: Any, steps: int, count: int) -> Sequence[int]:
    """Step of each of ``count`` calls; what rounding adds to some "trailing" timesteps belongs to the last one."""
    if hasattr(scheduler, "plms_timesteps"):
        first = [call // RUNGE_KUTTA for call in range(len(scheduler.prk_timesteps))] or [0]
        return first + [max(0, steps - count + call) for call in range(len(first), count)]
    return [min(call // scheduler.order, steps - 1) for call in range(count)]


def openings(scheduler: Any, steps: int | None) -> list[int]:
    """Which of ``model_calls`` are the first of their step, by number."""
    return [place for place, call in enumerate(model_calls(scheduler, steps)) if call.opens]


def start_scale(scheduler: Any) -> float:
    """What standard normal noise is multiplied with at a run's start; flow schedulers start from it as it is."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def model_input(scheduler: Any, latents: Tensor, t: Tensor) -> Tensor:
    """What the denoiser is given of a scheduler's own latents at its timestep ``t``; the latents themselves where the
    scheduler has no other scaling."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    scaled: Tensor = scheduler.scale_model_input(latents, t)
    return scaled


def call_level(scheduler: Any, t: Tensor) -> Level[float]:
    """The level of the latents that the denoiser is given at ``t``, the call that ``scheduler`` has come to.

    Schedulers with x = x0 + sigma eps scale it for the denoiser by alpha; the others have a table by timestep.
    """
    one = torch.ones(1)
    scaled = scheduler.scale_model_input(one, t)
    alpha_sq = scheduler.alphas_cumprod[int(t)] if scaled is one else scaled.cpu() ** 2
    return Level.from_alpha_bar(float(alpha_sq))
