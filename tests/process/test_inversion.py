"""DDIM inversion against data whose probability-flow ODE has a closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion_align.process import OUTPUTS, VariancePreserving, ddim_invert

STD = 2.0
TABLE = torch.linspace(0.0, 1.0, 20_001, dtype=torch.float64)[1:]
ALPHA_BAR = torch.exp(-4 * TABLE**2) * (1 - 1e-6)


def gaussian_eps(x: Tensor, t: Tensor) -> Tensor:
    """The exact denoiser of N(0, STD^2): E[eps | x_t] = sqrt(1 - ab) x / (ab STD^2 + 1 - ab)."""
    ab = ALPHA_BAR[t].view(-1, 1, 1, 1)
    return (1 - ab).sqrt() * x / (ab * STD**2 + 1 - ab)


def solution(x0: Tensor, t: Tensor) -> Tensor:
    """Of the ODE: quantiles are kept, so x_t / x_0 is the ratio of the marginals' standard deviations."""
    ab = ALPHA_BAR[t].view(-1, 1, 1, 1)
    return x0 * (ab * STD**2 + 1 - ab).sqrt() / STD


@pytest.fixture
def x0() -> Tensor:
    return STD * torch.randn(5, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


T = torch.tensor([0, 700, 5_000, 12_345, 19_999])


def error(x0: Tensor, **options: int) -> float:
    return (ddim_invert(gaussian_eps, x0, T, ALPHA_BAR, **options) - solution(x0, T)).abs().max().item()


def test_inversion_converges_to_the_ode_at_first_order(x0: Tensor) -> None:
    coarse, middle, fine = (error(x0, num_steps=n) for n in (50, 100, 1600))
    assert middle / coarse == pytest.approx(0.5, abs=0.1)
    assert fine < 5e-3


def test_renoise_approaches_the_implicit_step_that_sampling_undoes(x0: Tensor) -> None:
    """Where x' = step(x, eps(x')), one DDIM sampling step from x' gives x back."""
    t = torch.full((5,), 2_000)
    plain = ddim_invert(gaussian_eps, x0, t, ALPHA_BAR, num_steps=1)
    renoised = ddim_invert(gaussian_eps, x0, t, ALPHA_BAR, num_steps=1, renoise_iterations=50)

    def sampled_back(x: Tensor) -> Tensor:
        ab = ALPHA_BAR[t].view(-1, 1, 1, 1)
        return (x - (1 - ab).sqrt() * gaussian_eps(x, t)) / ab.sqrt()

    assert (sampled_back(renoised) - x0).abs().max() < 0.2 * (sampled_back(plain) - x0).abs().max()


def test_every_sample_ends_at_exactly_its_own_timestep(x0: Tensor) -> None:
    alone = [ddim_invert(gaussian_eps, x0[i : i + 1], T[i : i + 1], ALPHA_BAR) for i in range(5)]
    torch.testing.assert_close(ddim_invert(gaussian_eps, x0, T, ALPHA_BAR), torch.cat(alone), rtol=0, atol=0)


def test_network_is_asked_at_levels_that_end_at_t(x0: Tensor) -> None:
    asked: list[Tensor] = []

    def record(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return gaussian_eps(x, t)

    ddim_invert(record, x0, torch.tensor([10, 7, 3, 999, 905]), ALPHA_BAR, num_steps=10)
    grid = torch.stack(asked)
    assert grid[-1].tolist() == [10, 7, 3, 999, 905]
    assert (grid.diff(dim=0) >= 0).all()
    assert grid[:, 0].tolist() == list(range(1, 11))


def test_inverted_noise_leads_back_to_x_t(x0: Tensor) -> None:
    x_t = ddim_invert(gaussian_eps, x0, T, ALPHA_BAR)
    tau = VariancePreserving(ALPHA_BAR, OUTPUTS["epsilon"]).at(T, x0.dtype).eps(x_t, x0)
    ab = ALPHA_BAR[T].view(-1, 1, 1, 1)
    torch.testing.assert_close(ab.sqrt() * x0 + (1 - ab).sqrt() * tau, x_t)


def test_fresh_noise_keeps_the_marginal_variance() -> None:
    generator = torch.Generator().manual_seed(1)
    x0 = STD * torch.randn(1, 4, 200, 200, dtype=torch.float64, generator=generator)
    noise = torch.randn(50, *x0.shape, dtype=torch.float64, generator=generator)
    t = torch.tensor([9_000])
    x_t = ddim_invert(gaussian_eps, x0, t, ALPHA_BAR, num_steps=50, eta=0.5, noise=noise)
    ab = ALPHA_BAR[9_000]
    assert x_t.std().item() == pytest.approx((ab * STD**2 + 1 - ab).sqrt().item(), rel=0.02)
    deterministic = ddim_invert(gaussian_eps, x0, t, ALPHA_BAR, num_steps=50)
    assert (x_t - deterministic).abs().mean() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "at least 1 step"),
        ({"eta": 0.1}, r"needs noise of shape \(10, 5, 4, 8, 8\), found none"),
        ({"t": torch.tensor([1, 2, 3, 4, 20_000])}, r"must lie in \[0, 20000\)"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str, x0: Tensor) -> None:
    arguments = {"t": T, **options}
    t = arguments.pop("t")
    with pytest.raises(ValueError, match=message):
        ddim_invert(gaussian_eps, x0, t, ALPHA_BAR, **arguments)  # type: ignore[arg-type]
