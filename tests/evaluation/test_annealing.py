"""Learned schedules: the regression against a value that is known, files, and the guider in the sampler."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.evaluation.annealing_fit import Rollouts, fit_annealing, random_schedules, ridge, roll_out, within
from diffusion_align.guidance.annealing import AnnealingGuidance, AnnealingSchedule
from diffusion_align.sampling.control import GuidedStep, SamplingOptions
from diffusion_align.sampling.sampler import sample
from tests.brightness import Brightness

PROMPTS = ["a large red star on a dark background", "two small blue rings"]
LOW, HIGH = 1.0, 9.0


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(sdxl_folder)


def constant(scale: float) -> AnnealingSchedule:
    share = math.log(scale / LOW) / math.log(HIGH / LOW)
    zeros = torch.zeros(2, dtype=torch.float64)
    b2 = torch.tensor(math.log(share / (1 - share)), dtype=torch.float64)
    return AnnealingSchedule(LOW, HIGH, zeros, zeros + 1, torch.ones(3, 2).double(), torch.zeros(3).double(),
                             torch.zeros(3).double(), b2)  # fmt: skip


def planted(noise: float) -> Rollouts:
    """Rewards that fall with the squared distance of log s from an optimum that rises with the level and with |delta|;
    each prompt has a level of reward of its own."""
    generator = torch.Generator().manual_seed(0)
    prompts, each, steps = 60, 10, 5
    count = prompts * each
    group = torch.arange(count) % prompts
    levels = torch.linspace(-5, 5, steps, dtype=torch.float64).expand(count, steps)
    deltas = (0.5 * torch.randn(count, steps, generator=generator, dtype=torch.float64) - 2).exp()
    scales = random_schedules(count, steps, LOW, HIGH, generator)
    best = math.log(3) + 0.1 * levels + 0.3 * (deltas.log() + 2)
    reward = -(scales.log() - best).square().mean(dim=1) + 5 * (group % 7)
    reward = reward + noise * torch.randn(count, generator=generator, dtype=torch.float64)
    return Rollouts(levels, deltas, scales, reward, group)


@pytest.mark.slow
def test_the_fit_finds_a_planted_optimum() -> None:
    found = fit_annealing(planted(noise=0.02), LOW, HIGH)
    assert found.explained > 0.9
    assert found.rollouts == 600
    level, delta = torch.tensor([-4.0, 0.0, 4.0]).double(), torch.tensor([math.exp(-2)] * 3).double()
    want = torch.exp(math.log(3) + 0.1 * level)
    torch.testing.assert_close(found.schedule(level, delta), want, rtol=0.12, atol=0)
    wide = found.schedule(torch.zeros(2).double(), torch.tensor([-2.6, -1.4]).double().exp())
    assert float(wide[1] / wide[0]) == pytest.approx(math.exp(0.3 * 1.2), rel=0.12)


@pytest.mark.slow
def test_rewards_that_know_nothing_of_scales_explain_nothing() -> None:
    blind = planted(noise=0.0)
    noise = torch.randn(len(blind.reward), generator=torch.Generator().manual_seed(1)).double()
    found = fit_annealing(Rollouts(blind.levels, blind.deltas, blind.scales, noise, blind.group), LOW, HIGH)
    assert found.explained < 0.05


def test_regression_within_groups_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(2)
    x, group = torch.randn(40, 3, generator=generator, dtype=torch.float64), torch.arange(40) % 8
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + group
    found = ridge(within(x, group), within(y[:, None].double(), group)[:, 0])
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0, 0.5]).double(), rtol=0.06, atol=0.03)
    assert within(x, group).view(5, 8, 3).mean(dim=0).abs().max() < 1e-12


@pytest.mark.slow
def test_rollouts_of_a_model_and_the_learned_guider(adapter: Adapter, tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_prompt": 2, "steps": 2, "batch_size": 2, "bf16": False}
    found = roll_out(adapter, Brightness(), PROMPTS, low=LOW, high=HIGH, **options)
    assert found.scales.shape == found.deltas.shape == found.levels.shape == (4, 2)
    assert found.group.tolist() == [0, 1, 0, 1]
    assert ((found.scales >= LOW) & (found.scales <= HIGH)).all()
    assert (found.levels[:, 1] > found.levels[:, 0]).all()
    fitted = fit_annealing(found, LOW, HIGH)
    file = fitted.schedule.save(tmp_path / "schedule.json")
    seen: list[GuidedStep] = []
    drawn = sample(
        adapter, PROMPTS, num_inference_steps=2, guidance=AnnealingGuidance(str(file)), seeds=[1, 2],
        options=SamplingOptions(on_guided=seen.append),
    )  # fmt: skip
    assert drawn.nfe == 4
    cond, null = seen[0].plain(None)
    delta = (cond - null).square().mean(dim=(1, 2, 3)).sqrt()  # this model predicts noise
    level = found.levels[:2, 0]
    torch.testing.assert_close(drawn.scales[0], fitted.schedule(level, delta.double()).float(), rtol=1e-4, atol=1e-4)


def test_a_constant_schedule_is_static_guidance(adapter: Adapter, tmp_path: Path) -> None:
    learned = AnnealingGuidance().use(constant(3.0))
    drawn = sample(adapter, PROMPTS, num_inference_steps=2, guidance=learned, seeds=[1, 2])
    static = sample(adapter, PROMPTS, num_inference_steps=2, guidance=3.0, seeds=[1, 2])
    assert (drawn.images - static.images).abs().max() < 1e-4
    half = sample(
        adapter, PROMPTS, num_inference_steps=2, guidance=AnnealingGuidance(stop=0.5).use(constant(3.0)), seeds=[1, 2]
    )
    assert half.nfe == 3
    file = constant(3.0).save(tmp_path / "schedule.json")
    content = json.loads(file.read_text())
    for name, value, message in (
        ("kind", "other", "expected kind"),
        ("w1", [[1.0]], "do not fit"),
        ("b2", float("nan"), "not finite"),
        ("low", "much", "no schedule"),
    ):
        file.write_text(json.dumps({**content, name: value}))
        with pytest.raises(ValueError, match=message):
            AnnealingSchedule.load(file)
    with pytest.raises(FileNotFoundError, match="evaluate guidance --fit"):
        AnnealingSchedule.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="needs a schedule"):
        sample(adapter, PROMPTS, num_inference_steps=1, guidance=AnnealingGuidance(), seeds=[1, 2])
    with pytest.raises(ValueError, match="at least 2"):
        roll_out(adapter, Brightness(), PROMPTS, low=LOW, high=HIGH, per_prompt=1)
