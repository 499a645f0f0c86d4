"""What the gap of rewards and the safeguard do to the loss, against straight lines."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusion_align.objectives.list_stats import ListStats
from diffusion_align.training.online.preference.config import OnlineDPOConfig
from diffusion_align.training.online.preference.renoised_lists import Part
from diffusion_align.training.online.preference.round_loss import RoundLoss

ERROR = [[0.30, 0.32], [0.25, 0.20], [0.40, 0.41]]
REFERENCE = [[0.31, 0.31], [0.24, 0.21], [0.42, 0.40]]
SCORE = [[2.0, 0.5], [1.0, 0.9], [3.0, -1.0]]
OVERLAP = [[0.30, 0.29], [0.25, 0.30], [0.40, -0.1]]
#: 0.5 beta (s_w - s_l) with beta = 100.
U = [50 * ((r[0] - e[0]) - (r[1] - e[1])) for e, r in zip(ERROR, REFERENCE, strict=True)]


def computed(parts: int = 1, p: torch.Tensor | None = None, **changes: Any) -> tuple[float, torch.Tensor]:
    """Loss of the pairs, cut into so many parts, and its gradient to their errors."""
    config = OnlineDPOConfig(beta=100.0, **changes)
    error = torch.tensor(ERROR, requires_grad=True)
    whole = ListStats(error, torch.tensor(REFERENCE), None, None, torch.tensor(OVERLAP))
    part = Part(["", "", ""], torch.zeros(3, 2, 1, 1, 1), torch.arange(3), torch.tensor(SCORE), p=p)
    cuts = [slice(0, 3)] if parts == 1 else [slice(0, 2), slice(2, 3)]
    stats = [replace(whole, **{n: getattr(whole, n)[c] for n in ("error", "reference", "overlap")}) for c in cuts]
    pieces = [
        replace(part, prompts=part.prompts[c], x0=part.x0[c], seeds=part.seeds[c], score=part.score[c])
        for c in cuts
        if part.score is not None
    ]
    loss = RoundLoss(config)(pieces, stats).loss
    return loss.item(), torch.autograd.grad(loss, error)[0]


def log_sigmoid(u: float) -> float:
    return -math.log1p(math.exp(-u))


def test_soft_labels_follow_from_the_gap() -> None:
    gaps = torch.tensor(SCORE)[:, 0] - torch.tensor(SCORE)[:, 1]
    p = [1 / (1 + math.exp(-float(gap) / 0.8)) for gap in gaps]
    expected = sum(-a * log_sigmoid(u) - (1 - a) * log_sigmoid(-u) for a, u in zip(p, U, strict=True)) / 3
    assert computed(p=torch.sigmoid(gaps / 0.8))[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("changes", [{"score_target": 0.3}, {"extragradient": True}])
def test_ipo_aims_at_the_gap(changes: dict[str, Any]) -> None:
    per_gap = changes.get("score_target", 0.5)
    expected = sum((u - per_gap * (w - v)) ** 2 for u, (w, v) in zip(U, SCORE, strict=True)) / 3
    assert computed(loss_type="ipo", **changes)[0] == pytest.approx(expected, rel=1e-4)


def test_the_safeguard_weakens_the_rejected_gradient_alone() -> None:
    plain, gradient = computed()
    guarded, weaker = computed(safeguard_mu=0.2)
    assert guarded == plain
    assert torch.equal(weaker[:, 0], gradient[:, 0])
    factors = [0.8 * 0.30 / 0.29, 0.8 * 0.25 / 0.30, 1.0]  # the last overlap is negative
    assert torch.allclose(weaker[:, 1], gradient[:, 1] * torch.tensor(factors).clamp(max=1), rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "lair", "dgpo"])
def test_own_and_human_pairs_count_alike(loss_type: Any) -> None:
    (one, gradient), (two, same) = computed(1, loss_type=loss_type), computed(2, loss_type=loss_type)
    assert one == pytest.approx(two, rel=1e-5)
    assert torch.allclose(gradient, same, rtol=1e-5)
