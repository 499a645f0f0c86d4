"""Inversion: from clean latents to the noisy ones that deterministic sampling would have started from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .levels import Level
from .outputs import OUTPUTS
from .path import Path, VariancePreserving

#: (x, t) -> ``Path.moving``'s quantity (noise; flow matching: the flow): x (B, C, h, w) at times t (B,), like x.
Predict = Callable[[Tensor, Tensor], Tensor]


def invert(
    path: Path,
    predict: Predict,
    x0: Tensor,
    t: Tensor,
    *,
    num_steps: int = 10,
    renoise_iterations: int = 0,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """x_t from x0 by ``num_steps`` reversed DDIM steps (2010.02502, eq. 13) that end at exactly t for every sample.

    Sample i visits the levels at floor(k t_i / num_steps), k = 1..num_steps, starting from the clean image (alpha = 1);
    of flow matching those at k t_i / num_steps, where a step is Euler's: x + (sigma' - sigma) u(x, sigma').

    As in prompt-to-prompt's inversion and ReNoise, the network sees the latent of the level it leaves with the time of
    the level it goes to. Levels that coincide (t < num_steps) are steps that change nothing.

    Args:
        predict: the denoiser, without guidance.
        x0: clean latents (B, C, h, w), float32 or float64.
        t: target times (B,): integers in [0, T), of flow matching in [0, 1].
        renoise_iterations: further predictions per step, made at the latent of the new level and averaged with each
            other (ReNoise, 2403.14602, sec. 4; two of them in SmPO); 0 takes the plain DDIM step.
        eta: share of fresh noise: the variance of the reverse step, in place of as much predicted noise, so that the
            level stays exact.
        noise: standard normal (num_steps, B, C, h, w), needed when ``eta`` > 0: randomness belongs to the caller.

    Raises:
        ValueError: ``num_steps`` < 1, times outside [0, T), or ``noise`` missing or of a wrong shape.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: DDIM inversion needs at least 1 step")
    if eta and (noise is None or noise.shape != (num_steps, *x0.shape)):
        found = "none" if noise is None else tuple(noise.shape)
        raise ValueError(f"eta = {eta} needs noise of shape {(num_steps, *x0.shape)}, found {found}")
    if t.device.type == "cpu":  # elsewhere it would stall
        path.check_times(t)
    x, level = x0, path.clean(x0)
    for k in range(1, num_steps + 1):
        step_t = path.time_before(t, k, num_steps)
        after = path.at(step_t, x0.dtype)
        fresh = noise[k - 1] if eta and noise is not None else None
        variance = path.variance(after, level, eta)  # of the step back, from the noisier level
        moving = predict(x, step_t).to(x0)
        following = _onward(path.split(x, moving, level), after, variance, fresh)
        total = torch.zeros_like(moving)
        for i in range(renoise_iterations):
            total = total + predict(following, step_t).to(x0)
            following = _onward(path.split(x, total / (i + 1), level), after, variance, fresh)
        x, level = following, after
    return x


def ddim_invert(predict_eps: Predict, x0: Tensor, t: Tensor, alpha_bar: Tensor, **options: Any) -> Tensor:
    """``invert`` on the variance-preserving path with the training schedule ``alpha_bar`` (T,)."""
    return invert(VariancePreserving(alpha_bar, OUTPUTS["epsilon"]), predict_eps, x0, t, **options)


def _onward(parts: tuple[Tensor, Tensor], after: Level[Tensor], variance: Tensor, fresh: Tensor | None) -> Tensor:
    """To the noisier ``after`` with clean latents and noise ``parts``; ``variance`` of it is replaced by ``fresh``."""
    x0, eps = parts
    if fresh is None:
        return after.noise(x0, eps)
    return after.alpha * x0 + (after.sigma_sq - variance).sqrt() * eps + variance.sqrt() * fresh
