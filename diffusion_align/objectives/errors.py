"""Prediction errors and their weights."""

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


def min_snr_weight(snr: Tensor, gamma: float = 5.0, prediction_type: str = "epsilon") -> Tensor:
    """min(snr, gamma) in units of the predicted quantity's own loss (Min-SNR, 2303.09556, sec. 3.4), like ``snr``.

    Dividing by snr (epsilon), snr + 1 (v_prediction) or 1 (sample) turns the weight of the x0 error into that of the
    network's own error.

    Raises:
        ValueError: unknown ``prediction_type``.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return clipped / snr
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    if prediction_type == "sample":
        return clipped
    raise ValueError(f"prediction_type {prediction_type!r}: expected epsilon, v_prediction or sample")
