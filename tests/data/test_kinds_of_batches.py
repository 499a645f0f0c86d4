"""Batches of pairs, of unpaired pictures and of ranked lists, and what pairs become of these."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusion_align.adapters import Conditioning
from diffusion_align.data import PairBatch
from diffusion_align.data.types import Example, collate


def pairs(**fields: Any) -> PairBatch:
    examples = [
        Example(f"caption {i}", torch.full((2, 6), float(i)), p, 1.0 + i, f"row {i}",
                pixels=torch.stack([torch.full((3, 2, 2), i + 0.25), torch.full((3, 2, 2), i + 0.75)]),
                cond=Conditioning(torch.full((1, 2, 2), float(i)), None), **fields)
        for i, p in enumerate((1.0, 0.5, 0.2))
    ]  # fmt: skip
    return collate(examples, [5, 6, 7])


def test_pairs_are_lists_of_two_with_the_verdict_s_ranks() -> None:
    lists = pairs().as_lists()
    assert lists.rank is not None
    assert lists.score is not None
    assert lists.rank.tolist() == [[0, 1], [0, 0], [1, 0]]
    torch.testing.assert_close(lists.score, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]]))
    assert lists.as_lists() is lists


def test_pairs_are_pictures_with_thumbs() -> None:
    pictures = pairs().as_pictures(torch.arange(6))
    assert pictures.label is not None
    assert pictures.pixels is not None
    assert pictures.cond is not None
    assert pictures.label.tolist() == [1, 1, 1, -1, -1, -1]
    assert pictures.pixels.shape == (1, 6, 3, 2, 2)
    assert pictures.pixels[0, :, 0, 0, 0].tolist() == [0.25, 1.25, 2.25, 0.75, 1.75, 2.75]
    assert pictures.size_ids.shape == (1, 6, 6)
    assert pictures.captions[1] == pictures.captions[4] == "caption 1"
    assert pictures.cond.embeds[:, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert pictures.weight.tolist() == [1, 2, 3, 1, 2, 3]
    assert pictures.seeds.tolist() == list(range(6))
    assert pictures.keys[4] == "row 1, rejected"
    assert pictures.as_pictures(torch.arange(6)) is pictures
    some = pictures.rows([4, 0])
    assert some.label is not None
    assert some.pixels is not None
    assert (some.keys, some.label.tolist()) == (["row 1, rejected", "row 0, chosen"], [-1, 1])
    assert some.pixels[0, :, 0, 0, 0].tolist() == [1.75, 0.25]


def test_lists_are_stacked_and_stay_what_they_are() -> None:
    ranked = pairs(rank=torch.tensor([1, 0]), mask=torch.tensor([True, False])).to("cpu")
    assert ranked.rank is not None
    assert ranked.mask is not None
    assert ranked.rank.tolist() == [[1, 0]] * 3
    assert ranked.mask.dtype == torch.bool
    assert ranked.as_lists() is ranked


def test_single_pictures_without_label_are_neither() -> None:
    single = collate([Example("c", torch.zeros(1, 6), 1.0, 1.0, "row 9", pixels=torch.zeros(1, 3, 2, 2))], [0])
    with pytest.raises(ValueError, match="row 9: expected a pair or a ranked list, found 1 picture"):
        single.as_lists()
    with pytest.raises(ValueError, match="row 9: expected pairs, or single pictures with a label, found 1"):
        single.as_pictures(torch.zeros(2))
