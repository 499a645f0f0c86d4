"""Preference losses against closed forms written independently, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffusion_align.objectives import PREFERENCE_LOSSES, PairStats, mse_per_sample, preference_loss

BETA = 2000.0
#: Losses whose value for a pair is a formula of that pair (and of the batch's mean reward).
PAIR_BY_PAIR = [name for name, loss in PREFERENCE_LOSSES.items() if not loss.across_batch]


def log_sig(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


#: beta of losses without a reference, which is another thing.
OWN_BETA = {"mapo": 0.1, "asft": 12.0}


def reference_losses(
    e_w: float, e_l: float, f_w: float, f_l: float, beta: float, mean: float, u0: float | None = None
) -> dict[str, float]:
    """Every loss of one pair, from the papers' formulas, in plain Python. ``mean`` is the batch's mean reward.

    ``u0`` is u where it has no gradient.
    """
    s_w, s_l = f_w - e_w, f_l - e_l
    b = beta / 2
    r_w, r_l, u = b * s_w, b * s_l, b * (s_w - s_l)
    z = max(0.0, mean)
    g = lambda e: 0.5 * e / (math.exp(0.5 * e) - 1)  # noqa: E731
    return {
        "sigmoid": -log_sig(u),
        "robust": -log_sig(u),
        "hinge": max(0.0, 1 - u),
        "ipo": b**2 * (s_w - s_l - 1 / (2 * b)) ** 2,
        "kto": 0.5 * ((1 - sig(r_w - z)) + (1 - sig(-(r_l - z)))),
        "bco_pair": -log_sig(r_w - mean) - log_sig(-(r_l - mean)),
        "sppo_hard": b**2 * ((s_w - 0.5 / b) ** 2 + (s_l + 0.5 / b) ** 2),
        "exo_pair": sig(u) * math.log(sig(u) / 0.999) + sig(-u) * math.log(sig(-u) / 0.001),
        "apo_zero": 1 - sig(r_w) + sig(r_l),
        "apo_down": sig(r_w) + 1 - sig(u),
        "nca_pair": -log_sig(r_w) - 0.5 * log_sig(-r_w) - 0.5 * log_sig(-r_l),
        "sft": e_w,
        "dmpo": sig(u) * math.log(sig(u) / 0.99) + sig(-u) * math.log(sig(-u) / 0.01),
        "linear": b * min(max(0.5 - 0.4 * (u if u0 is None else u0), 1e-3), 1 - 1e-3) * (e_w - e_l),
        "asft": beta * e_w - math.log(1 - math.exp(-beta * e_l)),
        "mapo": e_w - beta * log_sig(1000 * (g(e_w) - g(e_l))),
    }


@pytest.fixture(scope="module")
def errors() -> np.ndarray:
    """Rows: e_w, e_l, ref_w, ref_l; values as in training (about 0.1, differing by thousandths)."""
    rng = np.random.default_rng(0)
    return 0.1 + 0.003 * rng.standard_normal((4, 16))


def stats_of(errors: np.ndarray, grad: bool = False) -> PairStats:
    rows = [torch.tensor(row, dtype=torch.float64, requires_grad=grad and i < 2) for i, row in enumerate(errors)]
    return PairStats(*rows)


@pytest.mark.parametrize("name", PAIR_BY_PAIR)
def test_loss_equals_the_published_formula(name: str, errors: np.ndarray) -> None:
    beta = OWN_BETA.get(name, BETA)
    mean = float(np.mean(beta / 2 * np.concatenate([errors[2] - errors[0], errors[3] - errors[1]])))
    expected = [reference_losses(*column, beta, mean)[name] for column in errors.T]
    result = preference_loss(name, stats_of(errors), beta=beta)
    assert result.per_sample.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert result.loss.item() == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize("name", PAIR_BY_PAIR)
def test_gradient_agrees_with_finite_differences_of_the_formula(name: str, errors: np.ndarray) -> None:
    beta = OWN_BETA.get(name, BETA)
    stats = stats_of(errors, grad=True)
    preference_loss(name, stats, beta=beta).per_sample.sum().backward()
    # the batch mean carries no gradient, so the formula keeps it fixed
    mean = float(np.mean(beta / 2 * np.concatenate([errors[2] - errors[0], errors[3] - errors[1]])))
    h = 1e-8
    for i, tensor in ((0, stats.chosen), (1, stats.rejected)):
        for j in range(4):
            column = errors[:, j].copy()
            u0 = beta / 2 * (column[2] - column[0] - column[3] + column[1])
            column[i] += h
            above = reference_losses(*column, beta, mean, u0)[name]
            column[i] -= 2 * h
            below = reference_losses(*column, beta, mean, u0)[name]
            grad = (
                torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            )  # sft does not read the rejected ones
            assert grad[j].item() == pytest.approx((above - below) / (2 * h), rel=2e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "ipo", "kto", "bco_pair", "sppo_hard", "exo_pair", "apo_zero"])
def test_at_the_reference_the_loss_pulls_chosen_down_and_rejected_up(name: str) -> None:
    errors = torch.full((2, 8), 0.1, dtype=torch.float64)
    chosen, rejected = errors[0].clone().requires_grad_(), errors[1].clone().requires_grad_()
    preference_loss(name, PairStats(chosen, rejected, errors[0], errors[1]), beta=BETA).loss.backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad > 0).all()
    assert (rejected.grad < 0).all()


def trl_aot(errors: np.ndarray, paired: bool, eps: float) -> np.ndarray:
    """AOT as in TRL's DPOTrainer, line by line, with log-likelihoods -e and TRL's beta = BETA / 2; sorted."""
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps = -errors
    if paired:
        logratios = np.sort(chosen_logps - rejected_logps)
        delta = logratios - np.sort(ref_chosen_logps - ref_rejected_logps)
    else:
        delta = np.sort(chosen_logps - ref_chosen_logps) - np.sort(rejected_logps - ref_rejected_logps)
    x = BETA / 2 * delta
    return np.array([-log_sig(each) * (1 - eps) - log_sig(-each) * eps for each in x])


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_trl_s_and_each_loss_belongs_to_the_pair_of_its_rank(name: str, eps: float, errors: np.ndarray) -> None:
    paired = name == "aot"
    result = preference_loss(name, stats_of(errors), beta=BETA, label_smoothing=eps)
    expected = trl_aot(errors, paired, eps)
    assert result.loss.item() == pytest.approx(expected.mean(), rel=1e-9)
    ranks = np.argsort(np.argsort(errors[1] - errors[0] if paired else errors[2] - errors[0]))
    assert result.per_sample.tolist() == pytest.approx(expected[ranks].tolist(), rel=1e-9)
    alone = errors[:, :1]
    one, sigmoid = (
        preference_loss(each, stats_of(alone), beta=BETA, label_smoothing=eps) for each in (name, "sigmoid")
    )
    assert one.loss.item() == pytest.approx(sigmoid.loss.item(), rel=1e-9)
    assert abs(result.loss.item() - preference_loss("sigmoid", stats_of(errors), beta=BETA).loss.item()) > 1e-3


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_gradient_of_aot_agrees_with_finite_differences_of_trl_s(name: str, errors: np.ndarray) -> None:
    stats = stats_of(errors, grad=True)
    preference_loss(name, stats, beta=BETA).loss.backward()
    h = 1e-8
    for i, tensor in ((0, stats.chosen), (1, stats.rejected)):
        assert tensor.grad is not None
        for j in range(4):
            values = []
            for step in (h, -h):
                moved = errors.copy()
                moved[i, j] += step
                values.append(trl_aot(moved, name == "aot", 0.0).mean())
            assert tensor.grad[j].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=2e-4, abs=1e-4)


def test_several_losses_are_a_weighted_sum(errors: np.ndarray) -> None:
    """As TRL's list of losses with ``loss_weights`` (MPO)."""
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 3.0]
    mean = float(np.mean(BETA / 2 * np.concatenate([errors[2] - errors[0], errors[3] - errors[1]])))
    rows = [reference_losses(*column, BETA, mean) for column in errors.T]
    result = preference_loss(names, stats_of(errors), beta=BETA, loss_weights=weights)
    expected = [sum(w * row[name] for name, w in zip(names, weights, strict=True)) for row in rows]
    assert result.per_sample.tolist() == pytest.approx(expected, rel=1e-9)
    for name in names:
        assert result.metrics[f"loss/{name}"].item() == pytest.approx(np.mean([row[name] for row in rows]))
    unweighted = preference_loss(names, stats_of(errors), beta=BETA)
    assert unweighted.loss.item() == pytest.approx(np.mean([sum(row[name] for name in names) for row in rows]))


def test_options_reach_the_losses_of_a_list_that_compare(errors: np.ndarray) -> None:
    half = torch.full((errors.shape[1],), 0.5)
    both = preference_loss(["sigmoid", "sft"], stats_of(errors), beta=BETA, soft_labels=half, label_smoothing=0.1)
    alone = preference_loss("sigmoid", stats_of(errors), beta=BETA, soft_labels=half, label_smoothing=0.1)
    torch.testing.assert_close(both.per_sample, alone.per_sample + torch.tensor(errors[0]))
    shifted = preference_loss(["sigmoid", "kto"], stats_of(errors), beta=BETA, shift=torch.tensor(0.3))
    parts = [preference_loss("sigmoid", stats_of(errors), beta=BETA).per_sample]
    parts += [preference_loss("kto", stats_of(errors), beta=BETA, shift=torch.tensor(0.3)).per_sample]
    torch.testing.assert_close(shifted.per_sample, sum(parts))


def test_label_smoothing_is_the_expectation_over_flips(errors: np.ndarray) -> None:
    flipped = stats_of(errors[[1, 0, 3, 2]])
    plain, other = (preference_loss("sigmoid", s, beta=BETA).per_sample for s in (stats_of(errors), flipped))
    smoothed = preference_loss("sigmoid", stats_of(errors), beta=BETA, label_smoothing=0.1).per_sample
    torch.testing.assert_close(smoothed, 0.9 * plain + 0.1 * other)


def test_robust_loss_under_flipped_labels_is_the_clean_loss_on_average(errors: np.ndarray) -> None:
    eps = 0.2
    straight = preference_loss("robust", stats_of(errors), beta=BETA, label_smoothing=eps).per_sample
    flipped = preference_loss("robust", stats_of(errors[[1, 0, 3, 2]]), beta=BETA, label_smoothing=eps).per_sample
    clean = preference_loss("sigmoid", stats_of(errors), beta=BETA).per_sample
    torch.testing.assert_close((1 - eps) * straight + eps * flipped, clean)


def test_soft_label_of_one_half_is_indifferent_to_order(errors: np.ndarray) -> None:
    half = torch.full((errors.shape[1],), 0.5)
    one = preference_loss("sigmoid", stats_of(errors), beta=BETA, soft_labels=half)
    other = preference_loss("sigmoid", stats_of(errors[[1, 0, 3, 2]]), beta=BETA, soft_labels=half)
    torch.testing.assert_close(one.per_sample, other.per_sample)


def test_sample_weight_scales_each_pair(errors: np.ndarray) -> None:
    weight = torch.arange(16, dtype=torch.float64)
    result = preference_loss("sigmoid", stats_of(errors), beta=BETA, sample_weight=weight)
    assert result.loss.item() == pytest.approx((result.per_sample * weight).mean().item())


def test_metrics_describe_the_batch(errors: np.ndarray) -> None:
    metrics = preference_loss("sigmoid", stats_of(errors), beta=BETA).metrics
    e_w, e_l, f_w, f_l = errors
    u = BETA / 2 * ((f_w - e_w) - (f_l - e_l))
    assert metrics["implicit_accuracy"].item() == pytest.approx(np.mean(u > 0))
    assert metrics["margin"].item() == pytest.approx(u.mean())
    assert metrics["chosen_error_up"].item() == pytest.approx(np.mean(e_w > f_w))
    assert metrics["rewards/rejected"].item() == pytest.approx(np.mean(BETA / 2 * (f_l - e_l)))


def test_errors_are_subtracted_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(2, 4, 16, 16, generator=generator).half() for _ in range(2))
    exact = (prediction.double() - target.double()).square().mean(dim=(1, 2, 3))
    assert (mse_per_sample(prediction, target).double() - exact).abs().max() * BETA < 1e-2
    assert ((prediction - target).square().mean(dim=(1, 2, 3)).double() - exact).abs().max() * BETA > 5e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "sigmiod"}, "unknown loss_type 'sigmiod', did you mean 'sigmoid'"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "'hinge' has no label_smoothing: sigmoid, robust, exo_pair"),
        ({"loss_type": "hinge", "soft_labels": torch.ones(16)}, "'hinge' takes no soft labels: sigmoid, ipo do"),
        ({"loss_type": "hinge", "target": torch.ones(16)}, "'hinge' takes no target: ipo does"),
        ({"loss_type": "ipo", "eta": 0.1}, "'ipo' has no eta: linear has"),
        ({"loss_type": "ipo", "shift": torch.ones(())}, "'ipo' takes no shift: kto, bco_pair do"),
        ({"loss_type": ["sigmoid", "ipo"], "label_smoothing": 0.1}, "'ipo' has no label_smoothing"),
        ({"loss_type": "sft", "label_smoothing": 0.1}, "'sft' has no label_smoothing"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": ["ipo", "ipo"]}, "names 'ipo' twice"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 numbers for 2 losses"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.0]}, "expected numbers above 0"),
        ({"loss_type": ["sigmoid", "mapo"]}, "'mapo' has no reference, so that its beta is not that of 'sigmoid'"),
    ],
)
def test_bad_options_name_what_is_wrong(arguments: dict[str, object], message: str, errors: np.ndarray) -> None:
    with pytest.raises(ValueError, match=message):
        preference_loss(stats=stats_of(errors), beta=BETA, **arguments)  # type: ignore[arg-type]


def test_missing_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs reference errors"):
        preference_loss("sigmoid", PairStats(torch.ones(2), torch.ones(2)), beta=BETA)


def test_shapes_that_would_broadcast_are_an_error() -> None:
    with pytest.raises(ValueError, match="one shape"):
        mse_per_sample(torch.ones(2, 4, 8, 8), torch.ones(4, 8, 8))
