"""SDPO's factor against gradients that autograd takes, pair weights, targets, and exchanged pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.objectives import PairStats, preference_loss
from diffusion_align.objectives.safeguard import safeguard_factor, swapped, with_rejected_gradient

BETA = 2000.0


def outputs(seed: int, sharing: float = 0.9) -> tuple[torch.Tensor, ...]:
    """d of chosen and rejected, (6, 32) float64, which share noise, and reference errors (6,)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((6, 32))
    d_w, d_l = (sharing * noise + (1 - sharing) * rng.standard_normal((6, 32)) for _ in range(2))
    scale = 0.3 + rng.random((6, 1))
    return torch.tensor(d_w), torch.tensor(d_l * scale), *torch.tensor(0.1 * rng.random((2, 6)))


def stats_of(d_w: torch.Tensor, d_l: torch.Tensor, f_w: torch.Tensor, f_l: torch.Tensor) -> PairStats:
    overlap = (d_w * d_l).mean(1).detach()
    return PairStats((d_w**2).mean(1), (d_l**2).mean(1), f_w, f_l, overlap=overlap)


@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_the_factor_is_the_published_one(mu: float, over: str) -> None:
    """lambda = clip((1 - mu) |g_w|^2 / (<g_w, g_l> + 1e-9), 0, 1), g the gradients of the mean errors; line by line."""
    d_w, d_l, *_ = outputs(0)
    d_l[2] = -d_l[2]  # one pair whose gradients oppose each other
    for d in (d_w, d_l):
        d.requires_grad_()
    g_w, g_l = (torch.autograd.grad((d**2).mean(1).sum(), d)[0] for d in (d_w, d_l))
    dots, norms = (g_w * g_l).sum(1), (g_w**2).sum(1)
    if over == "batch":
        dots, norms = dots.sum().expand(6), norms.sum().expand(6)
    expected = [
        min(max((1 - mu) * float(norm) / (float(dot) + 1e-9), 0.0), 1.0) if dot > 0 else 1.0
        for dot, norm in zip(dots, norms, strict=True)
    ]
    found = safeguard_factor(stats_of(d_w, d_l, d_w[:, 0], d_l[:, 0]), mu, over)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert not found.requires_grad


def test_weights_of_the_pairs_enter_the_sums_of_the_batch() -> None:
    stats, c = stats_of(*outputs(1)), torch.arange(1.0, 7.0, dtype=torch.float64)
    assert stats.overlap is not None
    expected = 0.5 * float((c * stats.chosen).sum() / ((c * stats.overlap).sum() + 1e-9))
    assert safeguard_factor(stats, 0.5, "batch", c)[0].item() == pytest.approx(min(expected, 1.0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 1.0))
def test_the_chosen_error_does_not_rise_to_first_order(seed: int, sharing: float) -> None:
    """A step -g in the space of one output that both pictures share: d e_w = -<g_w, g_total> <= 0 with mu = 0."""
    d_w, d_l, f_w, f_l = outputs(seed, sharing)
    d_w.requires_grad_()
    d_l.requires_grad_()
    stats = stats_of(d_w, d_l, f_w, f_l)
    before = preference_loss("sigmoid", stats, beta=BETA)
    guarded = with_rejected_gradient(stats, safeguard_factor(stats, 0.0))
    loss = preference_loss("sigmoid", guarded, beta=BETA)
    assert torch.equal(loss.per_sample, before.per_sample)
    g_w, g_l = torch.autograd.grad(loss.per_sample.sum(), (d_w, d_l))
    assert ((2 * d_w / 32) * (g_w + g_l)).sum(1).min() >= -1e-9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-0.003, 0.003), min_size=4, max_size=4), st.floats(0.5, 1.0))
def test_pair_beta_is_a_beta_of_the_pair_s_own(moves: list[float], p: float) -> None:
    stats = PairStats(*(0.1 + torch.tensor([move], dtype=torch.float64) for move in moves))
    kappa = torch.tensor([3.0 * (2 * p - 1)], dtype=torch.float64)
    found = preference_loss("sigmoid", stats, beta=BETA, pair_beta=kappa)
    plain = preference_loss("sigmoid", stats, beta=BETA * float(kappa))
    torch.testing.assert_close(found.loss, plain.loss)
    assert found.metrics["margin"] == preference_loss("sigmoid", stats, beta=BETA).metrics["margin"]


def test_ipo_aims_at_soft_labels_and_targets() -> None:
    stats = PairStats(*torch.tensor(0.1 + 0.001 * np.random.default_rng(0).standard_normal((4, 3))))
    u = BETA / 2 * (stats.s_w - stats.s_l)
    p, target = torch.tensor([1.0, 0.75, 0.5]), torch.tensor([0.1, -0.2, 3.0])
    soft = preference_loss("ipo", stats, beta=BETA, soft_labels=p).per_sample
    torch.testing.assert_close(soft, (u - p + 0.5) ** 2)
    assert soft[0] == preference_loss("ipo", stats, beta=BETA).per_sample[0]
    aimed = preference_loss("ipo", stats, beta=BETA, target=target).per_sample
    torch.testing.assert_close(aimed, (u - target) ** 2)


def test_linear_has_dpo_s_gradient_at_the_reference() -> None:
    grads = []
    for name in ("linear", "sigmoid"):
        chosen, rejected = (torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        stats = PairStats(chosen, rejected, chosen.detach(), rejected.detach())
        preference_loss(name, stats, beta=BETA).loss.backward()
        assert chosen.grad is not None
        assert rejected.grad is not None
        grads.append(torch.stack([chosen.grad, rejected.grad]))
    torch.testing.assert_close(*grads)
    far = PairStats(*torch.tensor([[0.1], [0.2], [0.2], [0.1]]))
    assert preference_loss("linear", far, beta=BETA, eta=0.0).loss == 0


def test_exchanged_pairs_are_those_of_the_other_verdict() -> None:
    e = 0.1 + 0.002 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    stats = PairStats(*e, moved=torch.rand(2, 5), overlap=torch.rand(5))
    where = torch.tensor([True, False, True, False, False])
    found = preference_loss("sigmoid", swapped(stats, where), beta=BETA).per_sample
    other = preference_loss("sigmoid", PairStats(*e[[1, 0, 3, 2]]), beta=BETA).per_sample
    plain = preference_loss("sigmoid", stats, beta=BETA).per_sample
    assert torch.equal(found, torch.where(where, other, plain))
    assert stats.moved is not None
    again = swapped(swapped(stats, where), where)
    assert again.moved is not None
    assert torch.equal(again.moved, stats.moved)
    alone = swapped(PairStats(e[0], e[1]), where)
    assert (alone.chosen[0], alone.ref_chosen) == (e[1][0], None)
