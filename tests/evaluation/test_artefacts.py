"""Figures of pictures against straight-line formulas; alarms that fire on planted artefacts, and are quiet on the base.

The base's pictures are drawn once; what is resampled afterwards are their figures.
"""

from __future__ import annotations

import colorsys
import math
from collections import Counter
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm as normal
from scipy.stats import t as student
from torch import Tensor
from torch.nn import functional as F

from diffusion_align import load_adapter
from diffusion_align.data.prompts import training_prompts
from diffusion_align.evaluation.artefacts import RULES, Figures, Spread, alarms, changes, compare_pictures, measure
from diffusion_align.evaluation.artefacts.artefact_alarms import small_sample
from diffusion_align.evaluation.artefacts.artefact_figures import picture_figures
from diffusion_align.evaluation.artefacts.picture_measures import (
    colour_entropy,
    edge_density,
    lab,
    luma,
    saturation,
    seed_distance,
    spectrum_peaks,
)
from diffusion_align.evaluation.compare import SamplingSettings, sample_and_score

PROMPTS, SEEDS = 24, 4


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    """The base's pictures (P, 4, 3, 64, 64): four seeds of each prompt."""
    prompts = training_prompts("scenes-pairs", "validation")[:PROMPTS]
    repeated = [prompt for prompt in prompts for _ in range(SEEDS)]
    sampled = sample_and_score(load_adapter("scenes-sd"), repeated, None, SamplingSettings(5, 1.0, 7, 32))
    return sampled.images.view(PROMPTS, SEEDS, 3, 64, 64)


@pytest.fixture(scope="module")
def halves(drawn: Tensor) -> dict[tuple[int, ...], Figures]:
    """Figures of every choice of two of the four seeds."""
    pairs = combinations(range(SEEDS), 2)
    return {pair: measure(drawn[:, list(pair)].flatten(0, 1), 2) for pair in pairs}


def noise(count: int = 2, height: int = 48, width: int = 64) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def peak_by_loops(image: Tensor, period: int) -> float:
    """The docstring's formula for one picture, ring by ring."""
    pixels = image.double().numpy()
    y = 0.2126 * pixels[0] + 0.7152 * pixels[1] + 0.0722 * pixels[2]
    height, width = y.shape
    hann = [0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n) for n in (height, width)]
    window = np.outer(*hann)
    power = np.abs(np.fft.fft2(window * (y - y.mean()))) ** 2 / (window**2).sum() + 1e-6
    side = min(height, width)
    rings: dict[int, list[float]] = {}
    for i in range(height):
        for j in range(width):
            fy, fx = min(i, height - i) / height, min(j, width - j) / width
            rings.setdefault(round(max(fy, fx) * side), []).append(power[i, j])
    level = {ring: 10 * math.log10(sum(values) / len(values)) for ring, values in rings.items()}
    at = side // period
    near = [level[at + offset] for offset in (-3, -2, 2, 3) if at + offset <= side // 2]
    return level[at] - sum(near) / len(near)


def test_spectrum_peaks_are_the_formula() -> None:
    images = noise().double()
    expected = [[peak_by_loops(image, period) for period in (2, 4, 8)] for image in images]
    assert np.allclose(spectrum_peaks(luma(images)), expected, atol=1e-9)
    assert np.allclose(spectrum_peaks(luma(images.float())), expected, atol=1e-3)


def test_flat_pictures_have_no_peaks_and_small_ones_are_refused() -> None:
    assert spectrum_peaks(torch.full((1, 40, 40), 0.3)).abs().max() < 1e-3
    with pytest.raises(ValueError, match=r"pictures of \(24, 64\): a spectrum needs 32 pixels a side"):
        measure(noise(height=24))


def test_saturation_is_hsvs() -> None:
    image = noise(1, 5, 7).double()
    expected = np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in image[0].double().flatten(1).T.tolist()])
    assert saturation(image).item() == pytest.approx(expected)
    assert saturation(torch.zeros(1, 3, 4, 4)).item() == 0


@pytest.mark.parametrize(
    ("rgb", "expected"),  # CIE L*a*b* of sRGB's corners under D65, as published
    [((1, 1, 1), (100, 0, 0)), ((1, 0, 0), (53.24, 80.09, 67.20)), ((0, 1, 0), (87.73, -86.18, 83.18)),
     ((0, 0, 1), (32.30, 79.19, -107.86)), ((0, 0, 0), (0, 0, 0))],
)  # fmt: skip
def test_lab_has_the_published_corners(rgb: tuple[int, ...], expected: tuple[float, ...]) -> None:
    image = torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1)
    assert lab(image).flatten().tolist() == pytest.approx(expected, abs=0.02)


def test_edges_entropy_and_distance_of_pictures_that_are_known() -> None:
    halved = torch.zeros(1, 3, 10, 10)
    halved[..., 5:] = 0.5
    assert edge_density(luma(halved)).item() == pytest.approx(2 / 8)  # columns 4 and 5 of the 8 inner ones
    assert colour_entropy(halved).item() == pytest.approx(1.0)
    assert colour_entropy(torch.full((1, 3, 4, 4), 1.0)).item() == 0.0
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert seed_distance(features, 3).tolist() == pytest.approx([(5 + 4 + 3) / 3, 0.0])


def test_bad_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got 0 to 255"):
        measure(torch.tensor([0.0, 255.0]).repeat(3 * 32 * 16).view(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        measure(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="seeds_per_prompt = 2: 3 pictures are no multiple"):
        measure(noise(3), 2)
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        Spread.of(measure(noise(1)))


def test_every_figure_has_a_rule_and_a_measure() -> None:
    assert list(RULES) == [part.name for part in fields(Figures)]
    assert [*picture_figures(noise()), "diversity"] == list(RULES)


def test_the_spread_is_that_of_two_sets_of_prompts() -> None:
    """sqrt(2 / P) times the standard deviation over prompts."""
    base = measure(noise(40))
    expected = {name: (2 / 40) ** 0.5 * float(values.std()) for name, values in base.columns().items()}
    found = Spread.of(base, resamples=4000).deviations
    assert found == {name: pytest.approx(value, rel=0.05) for name, value in expected.items()}


def test_few_prompts_tell_little_about_a_spread() -> None:
    """Student's t, from scipy."""
    for count in (12, 24, 64):
        expected = student.ppf(normal.cdf(3.0), count - 1)
        assert small_sample(3.0, count) == pytest.approx(expected, rel=0.01)


def grid(period: int) -> Tensor:
    wave = torch.cos(2 * torch.pi * torch.arange(64) / period)
    return 0.02 * (wave[:, None] + wave[None, :])


def posterised(images: Tensor) -> Tensor:
    return (images * 2).round() / 2


PLANTED = {
    "stipple": lambda x: x + grid(2),
    "grid_4": lambda x: x + grid(4),
    "grid_8": lambda x: x + grid(8),
    "dark": lambda x: (x - 0.5) * 3 + 0.2,
    "bright": lambda x: (x - 0.5) * 3 + 0.8,
    "saturation": lambda x: x.mean(dim=1, keepdim=True) + 1.8 * (x - x.mean(dim=1, keepdim=True)),
    "green_red": lambda x: x + torch.tensor([0.1, -0.1, 0.0]).view(3, 1, 1),
    "blue_yellow": lambda x: x + torch.tensor([0.05, 0.05, -0.15]).view(3, 1, 1),
    "edges": lambda x: F.avg_pool2d(x, 33, 1, 16, count_include_pad=False),
    "colour_entropy": posterised,
    "diversity": lambda x: x[::2].repeat_interleave(2, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_an_alarm_fires_on_what_is_planted(name: str, drawn: Tensor, halves: dict[tuple[int, ...], Figures]) -> None:
    """Other seeds of the base, with the artefact in them."""
    base = halves[0, 1]
    planted = measure(PLANTED[name](drawn[:, 2:].flatten(0, 1)).clamp(0, 1), 2)
    fired = alarms(planted, base, Spread.of(base))
    assert name in {change.name for change in fired}
    (change,) = [change for change in fired if change.name == name]
    assert RULES[name].says in str(change)
    assert abs(change.moved) > 1
    if name in ("stipple", "grid_4", "grid_8"):
        assert {change.name for change in fired} & {"stipple", "grid_4", "grid_8"} == {name}


@pytest.mark.slow
def test_the_base_against_itself_is_quiet(halves: dict[tuple[int, ...], Figures]) -> None:
    """200 times 16 of the prompts, of each two seeds as base and the other two as tuned: at most 2% have an alarm."""
    generator, pairs = torch.Generator().manual_seed(0), list(halves)
    table = {name: torch.stack([halves[pair].columns()[name] for pair in pairs]) for name in RULES}
    fired: Counter[str] = Counter()
    noisy = 0
    for _ in range(200):
        prompts = torch.randperm(PROMPTS, generator=generator)[:16]
        half = torch.randint(len(pairs), (16,), generator=generator)
        # combinations() lists a pair and what it leaves out at mirrored places.
        base = Figures(**{name: values[half, prompts] for name, values in table.items()})
        tuned = Figures(**{name: values[len(pairs) - 1 - half, prompts] for name, values in table.items()})
        found = alarms(tuned, base, Spread.of(base, resamples=200))
        noisy += bool(found)
        fired.update(change.name for change in found)
    assert noisy <= 4, fired


def test_equal_pictures_have_not_moved(halves: dict[tuple[int, ...], Figures]) -> None:
    base = halves[0, 1]
    assert {change.moved for change in changes(base, base, Spread.of(base))} == {0.0}
    with pytest.raises(ValueError, match="tuned has 3 prompts"):
        changes(base.at(torch.arange(3)), base, Spread.of(base))


def test_two_folders_are_compared_by_name(tmp_path: Path) -> None:
    images = noise(6)
    for side, shown in (("base", images), ("tuned", (images + grid(4)[:48]).clamp(0, 1))):
        (tmp_path / side).mkdir()
        for number, image in enumerate(shown):
            pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
            Image.fromarray(pixels).save(tmp_path / side / f"{number}.png")
    found = {change.name: change for change in compare_pictures(tmp_path / "tuned", tmp_path / "base")}
    tensors = {change.name: change for change in compare_pictures(tmp_path / "tuned", images)}
    assert found["saturation"].tuned == tensors["saturation"].tuned
    assert found["saturation"].base == pytest.approx(tensors["saturation"].base, abs=2e-3)
    assert found["grid_4"].tuned > found["grid_4"].base
    (tmp_path / "tuned" / "5.png").rename(tmp_path / "tuned" / "6.png")
    with pytest.raises(ValueError, match=r"5.png is in .*base, not in .*tuned"):
        compare_pictures(tmp_path / "tuned", tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="expected a folder with pictures"):
        compare_pictures(tmp_path, tmp_path / "base")
    Image.new("RGB", (40, 40)).save(tmp_path / "base" / "6.png")
    with pytest.raises(ValueError, match=r"6.png is 40 x 40 pixels, the first picture 64 x 48"):
        compare_pictures(images, tmp_path / "base")
