"""Losses on lists and on labelled pictures against straight lines in float64, and what they are for two pictures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.objectives import (
    LIST_LOSSES,
    UNPAIRED_LOSSES,
    ListStats,
    Targets,
    alignment_loss,
    preference_loss,
)
from diffusion_align.objectives.list_stats import list_targets

BETA = 2000.0
SHIFT = 0.3


def log_sig(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


def list_by_hand(name: str, r: list[float], rank: list[int], advantage: list[float], order: list[float]) -> float:
    """The loss of one list without a mask, from the papers' formulas. ``order`` is r where it has no gradient."""
    n = len(r)
    if name == "lair":
        return sum(2 / n * (r[k] - advantage[k]) ** 2 for k in range(n))
    if name == "dgpo":
        return -log_sig(2 / n * sum(advantage[k] * r[k] for k in range(n)))
    if name == "plackett_luce":
        terms = []
        for k in range(n):
            worse = [j for j in range(n) if rank[j] > rank[k]]
            if worse:
                terms.append(math.log(sum(math.exp(r[j]) for j in [k, *worse])) - r[k])
        return sum(terms) / max(len(terms), 1)
    if name == "d2o":
        last = [k for k in range(n) if rank[k] == max(rank)]
        others = [k for k in range(n) if rank[k] != max(rank)]
        if not others:
            return 0.0
        return -log_sig(sum(r[k] for k in others) / len(others) - sum(r[k] for k in last) / len(last))
    assert name == "rankdpo"
    place = {k: i + 1 for i, k in enumerate(sorted(range(n), key=lambda k: (-order[k], rank[k], k)))}
    won = [
        sum(1.0 if rank[k] < rank[j] else 0.5 if rank[k] == rank[j] else 0.0 for j in range(n) if j != k) / (n - 1)
        for k in range(n)
    ]
    total = 0.0
    for i in range(n):
        for j in range(n):
            if rank[i] < rank[j]:
                gain = abs((2 ** won[i] - 1) - (2 ** won[j] - 1))
                total += gain * abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j])) * -log_sig(r[i] - r[j])
    return total


@pytest.fixture(scope="module")
def lists() -> dict[str, np.ndarray]:
    """Errors of policy and reference (8, 5), ranks with ties, and which pictures there are."""
    rng = np.random.default_rng(0)
    mask = rng.random((8, 5)) < 0.8
    mask[:, :2] = True
    return {
        "error": 0.1 + 0.003 * rng.standard_normal((8, 5)),
        "reference": 0.1 + 0.003 * rng.standard_normal((8, 5)),
        "rank": rng.integers(0, 4, (8, 5)),
        "mask": mask,
    }


def tensors(lists: dict[str, np.ndarray], name: str) -> tuple[ListStats, Targets]:
    error = torch.tensor(lists["error"], requires_grad=True)
    mask, rank = torch.tensor(lists["mask"]), torch.tensor(lists["rank"])
    targets = list_targets(rank, None, mask, LIST_LOSSES[name].advantage or "win_rate")
    return ListStats(error, torch.tensor(lists["reference"]), mask), targets


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_value_and_gradient_on_lists_are_those_of_the_formula(name: str, lists: dict[str, np.ndarray]) -> None:
    stats, targets = tensors(lists, name)
    assert targets.advantage is not None
    result = alignment_loss(name, stats, targets, beta=BETA)
    result.per_sample.sum().backward()
    assert stats.error.grad is not None
    assert stats.error.grad[~torch.tensor(lists["mask"])].abs().max() == 0

    def by_hand(row: int, error: np.ndarray) -> float:
        there = np.flatnonzero(lists["mask"][row])
        r, fixed = (BETA / 2 * (lists["reference"][row] - each)[there] for each in (error, lists["error"][row]))
        assert targets.advantage is not None
        advantage = targets.advantage[row][torch.tensor(there)].tolist()
        return list_by_hand(name, r.tolist(), lists["rank"][row][there].tolist(), advantage, fixed.tolist())

    for row in range(8):
        assert result.per_sample[row].item() == pytest.approx(by_hand(row, lists["error"][row]), rel=1e-6, abs=1e-9)
        for k in np.flatnonzero(lists["mask"][row]):
            moved = [lists["error"][row].copy() for _ in range(2)]
            moved[0][k] += 1e-8
            moved[1][k] -= 1e-8
            slope = (by_hand(row, moved[0]) - by_hand(row, moved[1])) / 2e-8
            assert stats.error.grad[row, k].item() == pytest.approx(slope, rel=2e-4, abs=1e-3)


def test_advantages_are_win_rates_or_standardised_scores() -> None:
    rank, score = torch.tensor([[0, 1, 1, 9]]), torch.tensor([[4.0, 2.0, 2.0, 100.0]])
    mask = torch.tensor([[True, True, True, False]])
    found = list_targets(rank, None, mask, "win_rate").advantages()
    torch.testing.assert_close(found, torch.tensor([[0.5, -0.25, -0.25, 0.0]]))
    deviation = float(np.std([4.0, 2.0, 2.0]))
    expected = torch.tensor([[4 / 3, -2 / 3, -2 / 3, 0.0]])
    torch.testing.assert_close(list_targets(rank, score, mask, "score").advantages(), expected)
    torch.testing.assert_close(list_targets(rank, score, mask, "standardised").advantages(), expected / deviation)
    assert list_targets(None, score, mask, "score").ranks()[mask].tolist() == [0, 1, 1]
    same = list_targets(None, torch.full((1, 3), 0.1), torch.ones(1, 3, dtype=torch.bool), "standardised")
    assert not same.advantages().any()
    with pytest.raises(ValueError, match="list_advantage score needs lists with scores"):
        list_targets(rank, None, mask, "score")


errors_of_pairs = st.lists(st.floats(0.05, 0.2), min_size=4, max_size=4)


@settings(max_examples=15, deadline=None)
@given(errors_of_pairs, st.booleans())
def test_two_pictures_are_a_pair(errors: list[float], first_is_better: bool) -> None:
    """The limits K = 2: Plackett-Luce, DGPO and D2O are DPO, LAIR is SPPO, RankDPO is DPO with one weight."""
    e = torch.tensor(errors, dtype=torch.float64).view(2, 1, 2)
    rank = torch.tensor([[0, 1] if first_is_better else [1, 0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    chosen_first = e if first_is_better else e.flip(2)
    as_pair = ListStats(chosen_first[0], chosen_first[1]).as_pairs()
    sigmoid, sppo = (preference_loss(name, as_pair, beta=50.0) for name in ("sigmoid", "sppo_hard"))
    weight = 1 / math.log(2) - 1 / math.log(3)
    expected = {
        "plackett_luce": sigmoid.loss, "dgpo": sigmoid.loss, "d2o": sigmoid.loss, "lair": sppo.loss,
        "rankdpo": weight * sigmoid.loss,
    }  # fmt: skip
    assert expected.keys() == LIST_LOSSES.keys()
    for name, value in expected.items():
        targets = list_targets(rank, None, mask, LIST_LOSSES[name].advantage or "win_rate")
        found = alignment_loss(name, ListStats(e[0], e[1]), targets, beta=50.0)
        torch.testing.assert_close(found.loss, value, rtol=1e-6, atol=1e-9)
        for metric, figure in sigmoid.metrics.items():
            torch.testing.assert_close(found.metrics[metric], figure, msg=metric, check_dtype=False)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.permutations(range(4)))
def test_the_order_in_which_a_list_is_stored_does_not_matter(rewards: list[float], order: list[int]) -> None:
    rank = torch.tensor([[0, 1, 1, 2]])
    for name in LIST_LOSSES:
        values = []
        for places in (list(range(4)), order):
            error = -torch.tensor([rewards], dtype=torch.float64)[:, places]
            targets = list_targets(rank[:, places], None, torch.ones(1, 4, dtype=torch.bool), "win_rate")
            values.append(alignment_loss(name, ListStats(error, torch.zeros_like(error)), targets, beta=2.0).loss)
        torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_at_the_reference_the_best_is_pulled_and_the_worst_is_pushed(name: str) -> None:
    error = torch.full((2, 4), 0.1, requires_grad=True)
    mask = torch.ones(2, 4, dtype=torch.bool)
    targets = list_targets(torch.arange(4).repeat(2, 1), None, mask, LIST_LOSSES[name].advantage or "win_rate")
    alignment_loss(name, ListStats(error, error.detach()), targets, beta=BETA).loss.backward()
    assert error.grad is not None
    assert (error.grad[:, 0] > 0).all()
    assert (error.grad[:, 3] < 0).all()


def test_options_of_list_losses_change_what_they_say(lists: dict[str, np.ndarray]) -> None:
    stats, targets = tensors(lists, "lair")
    assert targets.advantage is not None
    half = alignment_loss("lair", stats, Targets(rank=targets.rank, advantage=targets.advantage / 2), beta=BETA).loss
    assert alignment_loss("lair", stats, targets, beta=BETA, lair_lambda=2.0).loss.item() == pytest.approx(half.item())
    two = ListStats(torch.tensor([[0.1, 0.11]]), torch.tensor([[0.102, 0.1]]))
    ranked = Targets(rank=torch.tensor([[0, 1]]))
    found = alignment_loss("d2o", two, ranked, beta=BETA, d2o_alpha=0.5).loss.item()
    assert found == pytest.approx(-log_sig(1000 * (0.002 - 0.5 * -0.01)), rel=1e-4)
    with pytest.raises(ValueError, match="'plackett_luce' has no lair_lambda: lair has"):
        alignment_loss("plackett_luce", stats, targets, beta=BETA, lair_lambda=2.0)


def picture_by_hand(name: str, r: float, y: float, weights: tuple[float, float]) -> float:
    w = weights[0] if y > 0 else weights[1]
    if name == "kto":
        return w * (1 - 1 / (1 + math.exp(-y * (r - max(0.0, SHIFT)))))
    return -w * log_sig(y * (r - SHIFT))


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_value_and_gradient_on_pictures_are_those_of_the_formula(name: str) -> None:
    rng = np.random.default_rng(1)
    e, f = 0.1 + 0.002 * rng.standard_normal((2, 6))
    y, p = np.array([1.0, -1, 1, 1, -1, -1]), np.array([1.0, 1, 0.7, 1, 0.9, 0.5])
    error = torch.tensor(e[:, None], requires_grad=True)
    stats, targets = ListStats(error, torch.tensor(f[:, None])), Targets(label=torch.tensor(y), p=torch.tensor(p))
    options: dict[str, Any] = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    result = alignment_loss(name, stats, targets, beta=BETA, shift=torch.tensor(SHIFT, dtype=torch.float64), **options)
    result.per_sample.sum().backward()
    assert error.grad is not None

    def by_hand(i: int, error: float) -> float:
        right, wrong = (picture_by_hand(name, BETA / 2 * (f[i] - error), sign * y[i], (1.5, 0.5)) for sign in (1, -1))
        return p[i] * right + (1 - p[i]) * wrong

    for i in range(6):
        assert result.per_sample[i].item() == pytest.approx(by_hand(i, e[i]), rel=1e-9)
        slope = (by_hand(i, e[i] + 1e-8) - by_hand(i, e[i] - 1e-8)) / 2e-8
        assert error.grad[i, 0].item() == pytest.approx(slope, rel=1e-4, abs=1e-3)


@settings(max_examples=8, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-1, 1))
def test_a_liked_and_a_disliked_picture_are_a_pair(liked: float, disliked: float, shift: float) -> None:
    error = -torch.tensor([[liked], [disliked]], dtype=torch.float64)
    stats, z = ListStats(error, torch.zeros_like(error)), torch.tensor(shift, dtype=torch.float64)
    pair = ListStats(error.T, torch.zeros(1, 2, dtype=torch.float64)).as_pairs()
    targets = Targets(label=torch.tensor([1.0, -1.0]))
    for unpaired, paired, factor in (("kto", "kto", 1.0), ("bco", "bco_pair", 0.5)):
        found = alignment_loss(unpaired, stats, targets, beta=2.0, shift=z).loss
        torch.testing.assert_close(found, factor * preference_loss(paired, pair, beta=2.0, shift=z).loss)


def test_one_signature_takes_pairs_too() -> None:
    rng = np.random.default_rng(2)
    e, f = (torch.tensor(0.1 + 0.001 * rng.standard_normal((5, 2))) for _ in range(2))
    stats, p = ListStats(e, f), torch.tensor(rng.random(5))
    same = preference_loss("sigmoid", stats.as_pairs(), beta=BETA, soft_labels=p).loss
    assert alignment_loss("sigmoid", stats, Targets(p=p), beta=BETA).loss == same
    scores = torch.tensor(rng.random((5, 2)))
    capo = alignment_loss("ipo", stats, Targets(advantage=scores), beta=BETA).per_sample
    u = BETA / 2 * ((f - e)[:, 0] - (f - e)[:, 1])
    torch.testing.assert_close(capo, (u - (scores[:, 0] - scores[:, 1])) ** 2)


@pytest.mark.parametrize(
    ("loss_type", "targets", "message"),
    [
        ("plackett_luse", Targets(rank=torch.tensor([[0, 1]])), "unknown loss_type 'plackett_luse'"),
        ("plackett_luce", Targets(), "needs targets with rank"),
        ("lair", Targets(rank=torch.tensor([[0, 1]])), "needs targets with advantage"),
        ("kto", Targets(label=torch.ones(1)), "expected shift"),
    ],
)
def test_what_is_missing_is_named(loss_type: str, targets: Targets, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alignment_loss(loss_type, ListStats(torch.ones(1, 2), torch.ones(1, 2)), targets, beta=1.0)


def test_lists_are_no_pictures_and_no_pairs() -> None:
    three = ListStats(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="'bco' takes single pictures, found lists of 3"):
        alignment_loss("bco", three, Targets(label=torch.ones(1)), beta=1.0, shift=torch.zeros(()))
    with pytest.raises(ValueError, match="expected pairs without a mask, found lists of 3"):
        alignment_loss("sigmoid", three, Targets(), beta=1.0)
    with pytest.raises(ValueError, match="ListStats needs reference"):
        alignment_loss("plackett_luce", ListStats(torch.ones(1, 3)), Targets(rank=torch.arange(3)[None]), beta=1.0)
