"""Flow matching's algebra: conversions, shifts, densities, the five kinds of noisy steps, inversion."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusion_align.process import (
    FLOW,
    KINDS,
    FlowMatching,
    FlowSampler,
    Level,
    Shift,
    StraightLevel,
    TimeDensity,
    VariancePreserving,
    invert,
    is_flow,
    log_snr,
    path_of,
)
from diffusion_align.process.outputs import min_snr_weight
from diffusion_align.process.path import scaled_linear

PATH = FlowMatching()
SHAPE = (4, 3, 8, 8)
SIGMA = torch.tensor([0.02, 0.3, 0.7, 1.0])
KEEPING = [name for name, kind in KINDS.items() if kind.keeps]


def drawn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def level(*sigmas: float) -> StraightLevel[Tensor]:
    return StraightLevel.from_sigma(torch.tensor(sigmas, dtype=torch.float64).view(-1, 1, 1, 1))


def test_views_of_the_target_are_what_it_was_made_of() -> None:
    x0, eps = drawn(1), drawn(2)
    x, target = PATH.noise(x0, eps, SIGMA), PATH.target(x0, eps, SIGMA)
    torch.testing.assert_close(target, eps - x0)
    found = PATH.views(target.float(), x.float(), SIGMA)
    for ours, true in ((found.x0, x0), (found.eps, eps), (found.flow, eps - x0)):
        torch.testing.assert_close(ours, true.float(), rtol=0, atol=1e-5)
    at = SIGMA.view(-1, 1, 1, 1)
    torch.testing.assert_close(found.v, ((1 - at) * eps - at * x0).float(), rtol=0, atol=1e-5)


def test_errors_of_x0_and_noise_are_weighted_errors_of_the_flow() -> None:
    x, out, off = drawn(1).float(), drawn(2).float(), drawn(3).float()
    one, other = PATH.views(out, x, SIGMA), PATH.views(out + off, x, SIGMA)
    flow = off.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close((one.x0 - other.x0).square().mean(dim=(1, 2, 3)), SIGMA**2 * flow)
    torch.testing.assert_close((one.eps - other.eps).square().mean(dim=(1, 2, 3)), (1 - SIGMA) ** 2 * flow)
    weight = min_snr_weight(FLOW, PATH.at(SIGMA), 5.0).flatten()
    torch.testing.assert_close(weight, (((1 - SIGMA) / SIGMA) ** 2).clamp(max=5) * SIGMA**2)


def test_a_twin_on_the_preserving_path_has_the_same_ratio() -> None:
    at = level(0.3)
    twin = at.preserving()
    assert twin.sigma / twin.alpha == pytest.approx(float(at.sigma / at.alpha))
    assert float(log_snr(twin.alpha_sq)) == pytest.approx(2 * math.log(0.7 / 0.3), abs=1e-5)
    x0, eps = drawn(1), drawn(2)
    torch.testing.assert_close(at.rescaled(at.noise(x0, eps)), twin.noise(x0, eps))
    same: Level[float] = Level.from_alpha_bar(0.3)
    assert same.preserving() is same


@pytest.mark.parametrize(
    ("shift", "offset"), [(Shift(3.0), math.log(3)), (Shift(dynamic=(0.5, 1.15, 256, 4096)), 0.5 + 0.65 * 768 / 3840)]
)
def test_shifts_are_translations_of_the_logit(shift: Shift, offset: float) -> None:
    assert shift.offset(1024) == pytest.approx(offset)
    dynamic = shift.dynamic is not None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    assert Shift.of(scheduler.config) == shift
    scheduler.set_timesteps(sigmas=[0.9, 0.4], mu=shift.mu(1024) if dynamic else None)
    expected = torch.tensor([0.9, 0.4]).logit() + offset
    torch.testing.assert_close(scheduler.sigmas[:2].logit(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["logit-normal", "uniform"])
def test_times_have_the_density_that_was_asked_for(kind: Any) -> None:
    offset, count = math.log(3), 4000
    times = TimeDensity(kind, mean=0.5, std=0.8).draw(generators(count), offset)
    before = (times.double().logit() - offset).clamp(-12, 12)
    if kind == "uniform":
        assert before.sigmoid().mean() == pytest.approx(0.5, abs=0.02)
        assert before.sigmoid().std() == pytest.approx(12**-0.5, abs=0.01)
    else:
        assert before.mean() == pytest.approx(0.5, abs=0.04)
        assert before.std() == pytest.approx(0.8, abs=0.03)
    cut = TimeDensity(kind, low=0.2, high=0.6).draw(generators(200), offset)
    assert cut.min() >= 0.2
    assert cut.max() <= 0.6
    alone = TimeDensity(kind).draw(generators(5)[3:4], offset)
    assert alone == TimeDensity(kind).draw(generators(5), offset)[3]


def test_levels_are_the_installed_schedulers_grid() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    found = path_of(scheduler).levels(scheduler)
    assert found.sigma.tolist() == scheduler.sigmas.tolist()
    assert found.sigma[9] == pytest.approx(0.0089, abs=1e-4)  # shifted twice: the plain formula says 0.25
    times = PATH.times(scheduler)
    torch.testing.assert_close(times, scheduler.sigmas[:-1], rtol=0, atol=1e-7)
    assert PATH.timestep(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 500, 999]


@pytest.mark.parametrize("kind", KEEPING)
def test_keeping_kinds_leave_the_noise_of_the_level(kind: Any) -> None:
    now, after = level(1.0, 0.8, 0.4), level(0.8, 0.4, 0.01)
    x0, eps = drawn(1, SHAPE)[:3], drawn(2, SHAPE)[:3]
    step = PATH.gaussian(now.noise(x0, eps), x0, now, after, 0.6, kind)
    direction = (step.mean - after.alpha * x0) / eps
    torch.testing.assert_close(direction**2 + step.std**2, (after.sigma**2).expand(3, 3, 8, 8))


def test_first_order_kinds_leave_more() -> None:
    """The numbers of SD3's grid at a = 0.7."""
    now, after = level(0.4649, 0.2780), level(0.2780, 0.0089)
    variance = PATH.variance(now, after, 0.7, "flow-sde")
    total = (KINDS["flow-sde"].direction(now, after, variance) ** 2 + variance).sqrt() / after.sigma
    assert total.flatten().tolist() == pytest.approx([1.23, 26.9], rel=0.02)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_without_noise_is_eulers(kind: Any) -> None:
    now, after = level(1.0, 0.8, 0.4), level(0.8, 0.4, 0.0)
    x, v = drawn(1)[:3], drawn(2)[:3]
    found = PATH.gaussian(x, FLOW.x0(v, x, now), now, after, 0.0, kind)
    torch.testing.assert_close(found.mean, x + (after.sigma - now.sigma) * v, rtol=0, atol=1e-6)
    assert float(found.std.max()) == 0


def test_flow_sde_is_flow_grpos_own_form() -> None:
    now, after, a = level(0.9, 0.5), level(0.7, 0.3), 0.7
    x, v = drawn(1)[:2], drawn(2)[:2]
    dt = after.sigma - now.sigma
    g = a * (now.sigma / (1 - now.sigma)).sqrt()
    mean = x * (1 + g**2 * dt / (2 * now.sigma)) + v * (1 + g**2 * (1 - now.sigma) / (2 * now.sigma)) * dt
    found = PATH.gaussian(x, FLOW.x0(v, x, now), now, after, a, "flow-sde")
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.std, g * (-dt).sqrt())
    first = PATH.gaussian(x[:1], x[:1], level(1.0), level(0.8), a, "flow-sde")  # its divisor is the next level's
    assert float(first.std) == pytest.approx(a * (0.2 / 0.2) ** 0.5)


def test_precise_at_root_two_is_ddim_and_cps_at_one_draws_all_anew() -> None:
    now, after = level(1.0, 0.8, 0.4), level(0.8, 0.4, 0.01)
    torch.testing.assert_close(
        PATH.variance(now, after, math.sqrt(2), "precise"), PATH.variance(now, after, 1.0, "ddim")
    )
    torch.testing.assert_close(PATH.variance(now, after, 1.0, "cps"), after.sigma_sq)


@pytest.mark.parametrize("kind", list(KINDS))
def test_sensitivity_is_the_derivative_of_the_mean(kind: Any) -> None:
    now, after, a = level(1.0, 0.8, 0.4), level(0.8, 0.4, 0.1), 0.6
    x, v = drawn(1)[:3], drawn(2)[:3]

    def mean(out: Tensor) -> Tensor:
        return PATH.gaussian(x, FLOW.x0(out, x, now), now, after, a, kind).mean

    slope = (mean(v + 1e-3) - mean(v))[:, :1, :1, :1] / 1e-3
    std = PATH.gaussian(x, x, now, after, a, kind).std
    torch.testing.assert_close(PATH.sensitivity(now, after, a, kind), slope**2 / (2 * std**2), rtol=1e-6, atol=0)


def test_the_general_ddim_is_todays_on_the_preserving_path() -> None:
    path = VariancePreserving.from_scheduler(DDPMScheduler())
    now, after = path.at(torch.tensor([900, 400])), path.at(torch.tensor([850, 300]))
    torch.testing.assert_close(KINDS["ddim"].variance(now, after, 0.8), path.variance(now, after, 0.8))
    assert path.gaussian(drawn(1)[:2], drawn(2)[:2], now, after, 0.8, "cps").std.min() > 0
    with pytest.raises(ValueError, match="noise_kind dance is for flow models: expected one of ddim, cps, precise"):
        path.variance(now, after, 0.8, "dance")


@pytest.mark.parametrize(
    ("kind", "a", "message"), [("sde", 0.5, "expected one of ddim"), ("cps", 1.5, "expected 0 to 1")]
)
def test_kinds_and_levels_that_have_no_meaning_are_refused(kind: Any, a: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PATH.variance(level(0.5), level(0.4), a, kind)


def test_inversion_and_sampling_come_back_to_x0() -> None:
    """On a constant field both are exact; on data N(0, s^2 I) they agree in the limit."""
    x0, constant = drawn(1), drawn(2)
    t = torch.tensor([0.3, 0.5, 0.9, 1.0])
    x_t = invert(PATH, lambda x, at: constant, x0, t, num_steps=3, renoise_iterations=1)
    torch.testing.assert_close(x_t - t.view(-1, 1, 1, 1) * constant, x0, rtol=0, atol=1e-6)
    asked: list[Tensor] = []

    def gaussian(x: Tensor, at: Tensor) -> Tensor:
        asked.append(at)
        sigma, spread = at.view(-1, 1, 1, 1), 0.5
        return x * (sigma - (1 - sigma) * spread**2) / (sigma**2 + ((1 - sigma) * spread) ** 2)

    inverted = invert(PATH, gaussian, 0.5 * x0, t, num_steps=200, renoise_iterations=2)
    assert asked[-1].tolist() == t.tolist()
    back = inverted
    for k in range(200, 0, -1):
        at = t * k / 200
        back = back - (t / 200).view(-1, 1, 1, 1) * gaussian(back, at)
    torch.testing.assert_close(back, 0.5 * x0, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        invert(PATH, gaussian, x0, torch.tensor([1.0, 2.0, 0.5, 0.5]))


def test_the_noise_found_by_inversion_is_the_target() -> None:
    x0, t = drawn(1), torch.tensor([0.3, 0.5, 0.9, 1.0])
    x_t = invert(PATH, lambda x, at: torch.tanh(x), x0, t)
    tau = PATH.at(t, x0.dtype).eps(x_t, x0)
    torch.testing.assert_close(PATH.target(x0, tau, t), (x_t - x0) / t.view(-1, 1, 1, 1))


def test_fresh_noise_in_inversion_keeps_the_level() -> None:
    wide = drawn(1, (1, 1, 200, 200)) * 0
    noise = drawn(3, (8, 1, 1, 200, 200))
    x_t = invert(PATH, lambda x, at: (x - wide) / at.view(-1, 1, 1, 1), wide + 0, torch.tensor([0.8]), num_steps=8,
                 eta=1.0, noise=noise)  # fmt: skip
    assert x_t.std() > 0.05  # of nothing but fresh noise


def test_the_gate_goes_by_the_schedulers_class() -> None:
    flow = FlowMatchEulerDiscreteScheduler()
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
    assert is_flow(flow)
    assert is_flow(solver)
    assert not is_flow(DDIMScheduler())
    assert path_of(solver) == FlowMatching(Shift(2.0))
    assert path_of(DDIMScheduler()).num_timesteps == 1000
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler is of flow matching"):
        VariancePreserving.from_scheduler(flow)
    with pytest.raises(ValueError, match="DDIMScheduler is not of flow matching"):
        FlowMatching.from_scheduler(DDIMScheduler())
    assert scaled_linear()[0] > 0.99


def test_a_flow_sampler_draws_its_gaussian() -> None:
    sampler = FlowSampler(FlowMatchEulerDiscreteScheduler(shift=3.0), PATH, "cps")
    sampler.set_timesteps(4)
    x, v, fresh = (drawn(seed).float() for seed in (1, 2, 3))
    now, after = (PATH.levels(sampler)[at].expand(4) for at in (0, 1))
    expected = PATH.gaussian(x, FLOW.x0(v, x, now), now, after, 0.8, "cps")
    (found,) = sampler.step(v, sampler.timesteps[0], x, eta=0.8, variance_noise=fresh)
    torch.testing.assert_close(found, expected.mean + expected.std * fresh)
    with pytest.raises(ValueError, match="needs variance_noise"):
        sampler.step(v, sampler.timesteps[1], x, eta=0.8)
