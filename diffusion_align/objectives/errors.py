"""Prediction errors."""

from __future__ import annotations

from torch import Tensor


def mse_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over C, H, W of (prediction - target)^2, (B,) float32.

    Both sides are cast to float32 *before* the subtraction: preference losses multiply differences of these errors by
    thousands, and half an ulp of a float16 error of 0.15 times beta / 2 = 2500 would move the logit by 0.15.

    Raises:
        ValueError: shapes differ (broadcasting would silently average the wrong thing).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape")
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
