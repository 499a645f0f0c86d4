"""How far a reward is to be trusted on a sample, from where its features lie among those the reward was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from diffusion_align.files import load_tensors, save_tensors

Trust = Literal["none", "prefpaint", "mahalanobis"]


@dataclass(frozen=True)
class FeatureStatistics:
    """What is remembered of the features psi (F,) that a reward was trained on, and of its errors.

    Attributes:
        count: pictures seen.
        mean: (F,) float64.
        gram: (F, F) float64, the sum of psi psi^T.
        error_line: (3,) float64, a, b and the mean error: on held-out pictures error = a + b distance.
    """

    count: int
    mean: Tensor
    gram: Tensor
    error_line: Tensor

    @classmethod
    def measure(cls, features: Tensor, held_out: Tensor | None = None, errors: Tensor | None = None) -> Self:
        """Statistics of ``features`` (N, F).

        Args:
            held_out: (M, G, F) features of pictures the reward was not trained on, in groups that share an error (the
                two of a pair).
            errors: (M,) the absolute errors, to be fitted by least squares. Where they do not grow with distance, the
                line is that of the bound for linear rewards: error = b distance.
        """
        psi = features.double()
        plain = cls(len(psi), psi.mean(dim=0), psi.T @ psi, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
        if held_out is None or errors is None:
            return plain
        distance = plain.mahalanobis(held_out.flatten(0, 1)).view(held_out.shape[:2]).mean(dim=1)
        design = torch.stack([torch.ones_like(distance), distance], dim=1)
        a, b = torch.linalg.lstsq(design, errors.double()[:, None]).solution[:, 0].tolist()
        mean = float(errors.double().mean())
        line = (a, b, mean) if b > 0 else (0.0, mean / float(distance.mean()), mean)
        return cls(plain.count, plain.mean, plain.gram, torch.tensor(line, dtype=torch.float64))

    def mahalanobis(self, features: Tensor, regularisation: float = 0.01) -> Tensor:
        """sqrt(N psi^T V^-1 psi) of centred ``features`` (B, F), (B,) float64: about sqrt(F) on the training data."""
        centred = self.gram - self.count * self.mean[:, None] * self.mean[None, :]
        ridge = regularisation * centred.diagonal().mean() * torch.eye(len(self.mean), dtype=torch.float64)
        factor = torch.linalg.cholesky(centred + ridge)
        psi = features.detach().cpu().double() - self.mean
        return self.count**0.5 * torch.linalg.solve_triangular(factor, psi.T, upper=False).norm(dim=0)

    def boundary(self, features: Tensor, regularisation: float = 0.01) -> Tensor:
        """|psi V^-1|_2 with V = Psi^T Psi + lambda I (2410.21966, released code) of ``features`` (B, F), (B,)."""
        factor = torch.linalg.cholesky(self.gram + regularisation * torch.eye(len(self.mean), dtype=torch.float64))
        return torch.cholesky_solve(features.detach().cpu().double().T, factor).norm(dim=0)

    def save(self, path: Path) -> None:
        tensors = {
            "count": torch.tensor(self.count),
            "mean": self.mean,
            "gram": self.gram,
            "error_line": self.error_line,
        }
        save_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> Self:
        tensors = load_tensors(path)
        return cls(int(tensors["count"]), tensors["mean"], tensors["gram"], tensors["error_line"])


class TrustWeight:
    """Weights of samples in a policy-gradient loss, from reward features psi (B, F).

    ``prefpaint`` is the published weight (2410.21966): w = clamp(exp(-0.05 boundary + 0.7), 1, 2.21): samples well
    inside the training data count up to 2.21 times, none counts less than once. ``mahalanobis`` takes the distance that
    bounds the error of a linear reward in theory, predicts the error as a + b distance, and weighs
    w = min(mean error / predicted error, max_weight): doubted samples count less than once.

    Raises:
        ValueError: another kind.
    """

    def __init__(self, kind: Trust, statistics: FeatureStatistics, max_weight: float = 2.0) -> None:
        if kind not in ("prefpaint", "mahalanobis"):
            raise ValueError(f"trust = {kind!r}: expected 'prefpaint' or 'mahalanobis'")
        self.kind, self.statistics, self.max_weight = kind, statistics, max_weight

    def __call__(self, features: Tensor) -> Tensor:
        """Weights (B,) float32 on the CPU.

        Raises:
            ValueError: features of another width than the statistics'.
        """
        if features.shape[1] != len(self.statistics.mean):
            raise ValueError(
                f"trust: {features.shape[1]} reward features, expected {len(self.statistics.mean)}: the statistics are "
                "of another scorer"
            )
        if self.kind == "prefpaint":
            return (-0.05 * self.statistics.boundary(features) + 0.7).exp().clamp(1.0, 2.21).float()
        a, b, mean = self.statistics.error_line.tolist()
        expected = (a + b * self.statistics.mahalanobis(features)).clamp(min=1e-3 * mean)
        return (mean / expected).clamp(max=self.max_weight).float()
