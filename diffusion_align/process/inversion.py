"""DDIM inversion: from a clean latent to the noisy one that deterministic sampling would have started from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: (x, t) -> eps: x (B, C, h, w) at integer timesteps t (B,); the noise has the shape of x.
PredictEps = Callable[[Tensor, Tensor], Tensor]


def ddim_invert(
    predict_eps: PredictEps,
    x0: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    *,
    num_steps: int = 10,
    renoise_iterations: int = 0,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """x_t from x0 by ``num_steps`` reversed DDIM steps (2010.02502, eq. 13) that end at exactly t for every sample.

    Sample i visits the levels floor(k t_i / num_steps), k = 1..num_steps, starting from the clean image
    (alpha_bar = 1). As in prompt-to-prompt's inversion and ReNoise, the network sees the latent of the level it leaves
    with the timestep of the level it goes to. Levels that coincide (t < num_steps) are steps that change nothing.

    Args:
        predict_eps: the denoiser, without guidance.
        x0: clean latents (B, C, h, w), float32 or float64.
        t: target timesteps (B,), integers in [0, T).
        alpha_bar: the training schedule, (T,).
        renoise_iterations: further predictions per step, made at the latent of the new level and averaged with each
            other (ReNoise, 2403.14602, sec. 4; two of them in SmPO); 0 takes the plain DDIM step.
        eta: share of fresh noise, sigma = eta sqrt((1 - ab_k) / (1 - ab_k+1) (1 - ab_k+1 / ab_k)); it replaces as much
            of the predicted noise, so that the level stays exact.
        noise: standard normal (num_steps, B, C, h, w), needed when ``eta`` > 0: randomness belongs to the caller.

    Raises:
        ValueError: ``num_steps`` < 1, timesteps outside [0, T), or ``noise`` missing or of a wrong shape.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: DDIM inversion needs at least 1 step")
    if eta and (noise is None or noise.shape != (num_steps, *x0.shape)):
        found = "none" if noise is None else tuple(noise.shape)
        raise ValueError(f"eta = {eta} needs noise of shape {(num_steps, *x0.shape)}, found {found}")
    if t.device.type == "cpu" and (int(t.min()) < 0 or int(t.max()) >= len(alpha_bar)):  # elsewhere it would stall
        raise ValueError(f"timesteps {t.tolist()} must lie in [0, {len(alpha_bar)})")
    table = alpha_bar.to(x0)
    x, level = x0, torch.ones_like(table[t])
    for k in range(1, num_steps + 1):
        step_t = t * k // num_steps
        next_level = table[step_t]
        fresh = noise[k - 1] if eta and noise is not None else None
        eps = predict_eps(x, step_t).to(x0)
        following = _step(x, eps, level, next_level, eta, fresh)
        total = torch.zeros_like(eps)
        for i in range(renoise_iterations):
            total = total + predict_eps(following, step_t).to(x0)
            following = _step(x, total / (i + 1), level, next_level, eta, fresh)
        x, level = following, next_level
    return x


def inverted_noise(x_t: Tensor, x0: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise that leads from x0 to x_t in one forward step, like ``x0``: InPO's training target (2503.18454).

    tau = (x_t - sqrt(alpha_bar_t) x0) / sqrt(1 - alpha_bar_t), for ``t`` (B,).
    """
    level = _column(alpha_bar.to(x0)[t], x0)
    return (x_t - level.sqrt() * x0) / (1 - level).sqrt()


def _step(x: Tensor, eps: Tensor, level: Tensor, next_level: Tensor, eta: float, noise: Tensor | None) -> Tensor:
    """From ``level`` to the noisier ``next_level`` (both alpha_bar, (B,)) along ``eps``."""
    ab, ab_next = _column(level, x), _column(next_level, x)
    predicted_x0 = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
    if noise is None:
        return ab_next.sqrt() * predicted_x0 + (1 - ab_next).sqrt() * eps
    variance = eta**2 * (1 - ab) / (1 - ab_next) * (1 - ab_next / ab)
    return ab_next.sqrt() * predicted_x0 + (1 - ab_next - variance).sqrt() * eps + variance.sqrt() * noise


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
