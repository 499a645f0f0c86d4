"""Pairs out of rewards, against straight lines."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_align.training.online.preference.pair_building import (
    Counts,
    Filters,
    all_pairs,
    best_and_worst,
    filtered,
    listed,
    random_pairs,
)

REWARD = torch.tensor([[0.1, 0.9, 0.5, 0.3], [2.0, 2.0, 1.0, 2.0]])


def test_the_best_meet_the_worst() -> None:
    assert best_and_worst(REWARD, 2).tolist() == [[[1, 0], [2, 3]], [[0, 2], [1, 3]]]


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=6), st.integers(0, 2**31))
def test_all_pairs_are_every_two_pictures_with_the_better_one_first(rewards: list[int], seed: int) -> None:
    expected = {frozenset(two) for two in itertools.combinations(range(len(rewards)), 2)}
    found = all_pairs(torch.tensor([rewards], dtype=torch.float32))[0].tolist()
    assert {frozenset(pair) for pair in found} == expected
    assert len(found) == len(expected)
    assert all(rewards[chosen] >= rewards[rejected] for chosen, rejected in found)
    some = random_pairs(torch.tensor([rewards], dtype=torch.float32), 1, [seed])[0].tolist()
    assert some[0] in found


def test_random_pairs_are_drawn_without_repetition() -> None:
    found = random_pairs(REWARD, 6, [1, 2])
    assert [sorted(map(tuple, pairs)) for pairs in found.tolist()] == [
        sorted(map(tuple, pairs)) for pairs in all_pairs(REWARD).tolist()
    ]
    assert not torch.equal(random_pairs(REWARD, 3, [1, 2]), random_pairs(REWARD, 3, [3, 4]))


def test_what_is_left_out_is_counted() -> None:
    """Four prompts: a small spread, a tie and a gap, two nearly equal pictures, and a good one."""
    reward = torch.tensor([[0.0, 0.01, 0.02], [1.0, 1.0, 3.0], [0.0, 2.0, 4.0], [0.0, 5.0, 9.0]])
    latents = torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents[2] = latents[2, :1] + 0.01 * latents[2]
    kept, counts = filtered(reward, latents, all_pairs(reward), Filters(0.1, 0.5, 0.2))
    assert counts == Counts(prompts=4, small_spread=1, without_pair=1, pairs=9, small_gap=1, near_duplicates=3)
    assert kept.sum(dim=1).tolist() == [0, 2, 0, 3]
    assert (counts.kept, counts.accepted) == (5, 0.5)


def test_equal_rewards_never_make_a_pair() -> None:
    reward, latents = torch.ones(2, 4), torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    kept, counts = filtered(reward, latents, best_and_worst(reward, 2), Filters())
    assert not kept.any()
    assert (counts.small_gap, counts.without_pair) == (4, 2)


def test_lists_have_the_best_first_and_no_picture_twice() -> None:
    """Three prompts: a small spread; one with a copy of its best picture; one whose pictures are all the same."""
    reward = torch.tensor([[0.0, 0.01, 0.02, 0.0], [1.0, 4.0, 3.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    latents = torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents[1, 3] = latents[1, 1] + 0.01 * latents[1, 3]
    latents[2] = latents[2, :1]
    order, present, counts = listed(reward, latents, Filters(0.1, 0.5, 0.2))
    assert order[1].tolist() == [1, 2, 3, 0]
    assert present.tolist() == [[False] * 4, [True, True, False, True], [False] * 4]
    assert counts == Counts(prompts=3, small_spread=1, without_pair=1, pairs=6, small_gap=0, near_duplicates=4)
    assert counts.kept == 2
