"""Models side by side: how sides are written, intervals that cover, corrections, and strengths that are recovered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from diffusion_align.evaluation.arena import (
    Board,
    Contest,
    detectable_gap,
    holm,
    paired_p,
    parse_sides,
    strengths,
    verdicts,
)
from diffusion_align.evaluation.arena.side_grammar import parse_side
from diffusion_align.evaluation.arena.strengths import ELO, PRIOR, fit
from diffusion_align.evaluation.arena.term_length import scale_of_length
from diffusion_align.evaluation.arena.votes import Vote, vote_verdicts, vote_wins
from diffusion_align.evaluation.stats import clustered_mean, clustered_win_rate


def board(*sides: np.ndarray, names: str = "abcdef", categories: dict[str, str] | None = None) -> Board:
    """Scores (P, K) of each side by one scorer."""
    prompts = [f"p{i:04d}" for i in range(len(sides[0]))]
    return Board(prompts, list(names[: len(sides)]), {"s": np.stack(sides)}, categories or {})


@pytest.mark.parametrize(
    ("text", "name", "what", "settings"),
    [
        ("base", "base", "base", ()),
        ("dpo=runs/dpo", "dpo", "runs/dpo", ()),
        ("runs/dpo", "dpo", "runs/dpo", ()),
        ("base@guidance_scale=7", "base@guidance_scale=7", "base", (("guidance_scale", "7"),)),
        ("x=base@guidance-scale=7,candidates=1+2", "x", "base", (("guidance_scale", "7"), ("candidates", "1+2"))),
        ("runs/sweep/000-beta=5", "000-beta=5", "runs/sweep/000-beta=5", ()),
        ("me/lora@guidance=dynamic", "lora@guidance=dynamic", "me/lora", (("guidance", "dynamic"),)),
    ],
)
def test_a_side_is_read_as_it_is_written(text: str, name: str, what: str, settings: tuple) -> None:
    side = parse_side(text)
    assert (side.name, side.what, side.settings) == (name, what, settings)


def test_what_is_there_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("002-beta=5@x=1").mkdir()
    assert parse_side("002-beta=5@x=1").what == "002-beta=5@x=1"
    assert parse_side("b=002-beta=5@x=1").what == "002-beta=5@x=1"


@pytest.mark.parametrize("text", ["", "@a=1", "base@", "base@scale", "base@scale="])
def test_what_is_no_side_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="side "):
        parse_side(text)


def test_sides_that_are_called_alike_get_numbers_and_given_names_must_differ() -> None:
    assert [side.name for side in parse_sides(["base", "base", "x/base"])] == ["base", "base (2)", "base (3)"]
    with pytest.raises(ValueError, match="another side called 'a'"):
        parse_sides(["a=base", "a=runs/x"])
    with pytest.raises(ValueError, match="at least two sides"):
        parse_sides(["base"])


def test_a_side_against_itself_is_even_and_all_ties() -> None:
    scores = np.random.default_rng(0).normal(size=(20, 3))
    (verdict,) = verdicts(board(scores, scores), [Contest("b", "a")])
    assert (verdict.win_rate.rate, verdict.win_rate.ties, verdict.p_holm) == (0.5, 60, 1.0)
    assert verdict.winner is None
    assert verdict.win_rate.interval[0] < 0.5 < verdict.win_rate.interval[1]


def test_exchanged_sides_have_the_opposite_win_rate() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(31, 3)), rng.normal(0.4, 1, size=(31, 3))
    b[:5] = a[:5]
    (one,), (other,) = (verdicts(board(*sides), [Contest("b", "a")]) for sides in ((a, b), (b, a)))
    low, high = one.win_rate.interval
    assert (one.win_rate.wins, one.win_rate.ties) == (other.win_rate.losses, other.win_rate.ties)
    assert other.win_rate.rate == pytest.approx(1 - one.win_rate.rate, abs=1e-15)
    assert other.win_rate.interval == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert other.p == pytest.approx(one.p)
    assert one.difference is not None
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(-one.difference.mean)


def test_prompts_are_sorted_so_that_their_order_cannot_matter() -> None:
    with pytest.raises(ValueError, match="sorted"):
        Board(["b", "a"], ["x"], {})


@pytest.mark.slow
def test_95_of_100_intervals_hold_the_true_win_rate() -> None:
    """500 simulated comparisons: 120 prompts, each with its own chance to win, three seeds each."""
    rng = np.random.default_rng(1)
    held = 0
    for number in range(500):
        chances = rng.beta(3, 2, size=120)  # mean 0.6
        won = (rng.random((3, 120)) < chances).astype(float) - 0.5
        rate = clustered_win_rate(list(won), resamples=200, seed=number)
        held += rate.interval[0] <= 0.6 <= rate.interval[1]
    assert 0.93 <= held / 500 <= 0.97


def test_the_mean_s_interval_is_as_wide_as_its_standard_error_says() -> None:
    values = np.random.default_rng(0).normal(0.2, 1.0, size=400)
    found = clustered_mean(values)
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(error, rel=0.05)
    assert found.interval == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.01)


def test_holm_s_correction_is_the_published_one() -> None:
    # Holm (1979) by hand: 0.01 x 4, 0.02 x 3, max(0.06, 0.03 x 2), 0.04 x 1 at least 0.06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_values_are_student_s() -> None:
    values = np.random.default_rng(0).normal(0.2, 1, size=30)
    assert paired_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert paired_p(np.full(6, 0.5)) == 2.0**-5
    assert paired_p(np.zeros(6)) == paired_p(np.ones(1)) == 1.0


def test_a_gap_of_the_detectable_size_is_seen_in_80_of_100_cases() -> None:
    gap = detectable_gap(1.0, 50)
    rng = np.random.default_rng(0)
    seen = [abs(rng.normal(gap, 1, size=50).mean()) * 50**0.5 > 1.96 for _ in range(2000)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.03)
    assert detectable_gap(1.0, 50, tests=5) > gap


def test_known_strengths_are_recovered() -> None:
    true = np.array([0.0, 0.5, 1.5, -1.0])
    rng = np.random.default_rng(1)
    scores = np.stack([rng.gumbel(strength, 1, size=(400, 4)) for strength in true])
    found = strengths(board(*scores).wins("s", list("abcd")), list("abcd"), "a", resamples=300)
    elo = np.array([each.elo for each in found])
    assert elo == pytest.approx(1000 + ELO * true, abs=30)
    for each, truth in zip(found, 1000 + ELO * true, strict=True):
        assert each.interval[0] <= truth <= each.interval[1]
    assert [each.rank for each in found] == [(3, 3), (2, 2), (1, 1), (4, 4)]
    assert found[0].interval == (1000.0, 1000.0)


def test_the_fit_is_where_its_gradient_vanishes_even_if_one_side_always_wins() -> None:
    wins = np.array([[[0, 30, 8], [0, 0, 5], [2, 5, 0]]], dtype=float)
    theta = fit(wins)[0]
    games = wins[0] + wins[0].T
    p = 1 / (1 + np.exp(-(theta[:, None] - theta[None])))
    assert (wins[0] - games * p).sum(axis=1) == pytest.approx(PRIOR * theta, abs=1e-8)
    assert theta.sum() == pytest.approx(0, abs=1e-9)


def test_equal_sides_share_a_range_of_ranks() -> None:
    rng = np.random.default_rng(3)
    sides = [rng.normal(size=(40, 2)) for _ in range(3)]
    found = strengths(board(*sides).wins("s", list("abc")), list("abc"), "b", resamples=200)
    assert all(each.rank == (1, 3) for each in found)


def test_sides_that_no_comparison_connects_are_named() -> None:
    votes = [Vote("p", "a", "b", 1.0), Vote("p", "c", "d", 0.5)]
    with pytest.raises(ValueError, match="no common scale: a, b; c, d"):
        strengths(vote_wins(votes, list("abcd")), list("abcd"), "a")


def test_votes_give_the_figures_that_scores_give() -> None:
    rng = np.random.default_rng(0)
    scored = board(rng.normal(size=(12, 2)), rng.normal(size=(12, 2)))
    shares = (scored.of("s", "b") > scored.of("s", "a")).astype(float)
    votes = [
        Vote(prompt, *pair, share)
        for prompt, row in zip(scored.prompts, shares, strict=True)
        for won in row
        for pair, share in [(("b", "a"), won) if rng.random() < 0.5 else (("a", "b"), 1 - won)]
    ]
    (of_votes,) = vote_verdicts(votes, [Contest("b", "a")], {})
    (of_scores,) = verdicts(scored, [Contest("b", "a")])
    assert of_votes.win_rate == of_scores.win_rate
    assert (of_votes.p_holm, of_votes.detectable) == (of_scores.p_holm, of_scores.detectable)
    assert (vote_wins(votes, "ab") == scored.wins("s", "ab")).all()


def test_categories_have_their_own_win_rates() -> None:
    a = np.zeros((6, 2))
    b = np.array([[1.0, 1]] * 3 + [[-1.0, -1]] * 3)
    of = {f"p{i:04d}": "up" if i < 3 else "down" for i in range(6)}
    (verdict,) = verdicts(board(a, b, categories=of), [Contest("b", "a")])
    assert {name: rate.rate for name, rate in verdict.categories.items()} == {"up": 1.0, "down": 0.0}
    assert verdict.win_rate.rate == 0.5


def test_a_length_is_found_between_beyond_and_never_below_scale_1() -> None:
    lengths = {1.0: 2.0, 3.0: 6.0, 5.0: 11.0}
    assert scale_of_length(4.0, lengths) == pytest.approx(2.0)
    assert scale_of_length(8.5, lengths) == pytest.approx(4.0)
    assert scale_of_length(16.0, lengths) == pytest.approx(7.0)
    assert scale_of_length(0.1, lengths) == 1.0
    with pytest.raises(ValueError, match="does not grow"):
        scale_of_length(1.0, {1.0: 2.0, 2.0: 2.0})
