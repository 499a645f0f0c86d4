"""Prompts encoded in chunks of one shape: a prompt's bits are its own, and what is remembered is bounded by bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from diffusion_align.adapters import Adapter, Conditioning, PromptEncoder, encode_in_chunks, load_adapter
from diffusion_align.adapters.prompts import CHUNK, byte_count

PROMPTS = ["", *(f"{size} {colour} ring" for size in ("a small", "two large") for colour in ("red", "blue", "grey"))]
PROMPTS += [f"a {shape} left of a large green star on a dark background" for shape in ("moon", "cross", "square")]


@pytest.fixture(scope="module", params=["sdxl_folder", "sd_folder"])
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return load_adapter(request.getfixturevalue(request.param))


def equal(first: Conditioning, second: Conditioning) -> bool:
    """Bit for bit."""
    same = torch.equal(first.embeds, second.embeds)
    if first.pooled is None or second.pooled is None:
        return same and first.pooled is second.pooled
    return same and torch.equal(first.pooled, second.pooled)


class Counting:
    """An adapter that notes which prompts its text encoders are given."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.device = adapter, adapter.device
        self.calls: list[list[str]] = []

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.calls.append(list(prompts))
        return self.adapter.encode_prompts(prompts)


def test_bits_do_not_depend_on_batch_order_or_memory(adapter: Adapter) -> None:
    one_by_one = [PromptEncoder(adapter)([prompt]) for prompt in PROMPTS]
    together = PromptEncoder(adapter)(PROMPTS)
    remembering = PromptEncoder(adapter)
    remembering(PROMPTS[3:6])
    backwards = remembering(PROMPTS[::-1])
    for i, row in enumerate(one_by_one):
        assert equal(together[i : i + 1], row)
        assert equal(backwards[len(PROMPTS) - 1 - i :][:1], row)


def test_bits_do_not_depend_on_the_place_in_a_chunk(adapter: Adapter) -> None:
    others = PROMPTS[1:CHUNK]
    first = encode_in_chunks(adapter, [PROMPTS[-1], *others])[:1]
    for place in range(1, CHUNK):
        row = encode_in_chunks(adapter, [*others[:place], PROMPTS[-1], *others[place:]])[place : place + 1]
        assert equal(row, first)


def test_rows_are_those_of_the_adapter(adapter: Adapter) -> None:
    found, expected = PromptEncoder(adapter)(PROMPTS), adapter.encode_prompts(PROMPTS)
    torch.testing.assert_close(found.embeds, expected.embeds)
    torch.testing.assert_close(found.pooled, expected.pooled)


def test_text_encoders_see_chunks_of_one_size_and_each_prompt_once(adapter: Adapter) -> None:
    counting: Any = Counting(adapter)
    encoder = PromptEncoder(counting)
    encoder(PROMPTS[:3] * 2)
    encoder(PROMPTS)
    assert {len(call) for call in counting.calls} == {CHUNK}
    assert [list(dict.fromkeys(call)) for call in counting.calls] == [PROMPTS[:3], PROMPTS[3:]]


def test_memory_is_bounded_by_bytes_and_forgets_what_was_used_longest_ago(adapter: Adapter) -> None:
    size = byte_count(adapter.encode_prompts(PROMPTS[:1]))
    encoder = PromptEncoder(adapter, capacity=3 * size)
    encoder(PROMPTS[:3])
    encoder(PROMPTS[:1])
    encoder(PROMPTS[3:4])
    assert list(encoder.rows) == [PROMPTS[2], PROMPTS[0], PROMPTS[3]]
    assert encoder.held == 3 * size == sum(byte_count(row) for row in encoder.rows.values())


def test_remembered_rows_own_no_more_memory_than_they_count(adapter: Adapter) -> None:
    encoder = PromptEncoder(adapter)
    encoder(PROMPTS)
    owned = sum(row.embeds.untyped_storage().nbytes() for row in encoder.rows.values())
    assert owned == sum(row.embeds.nbytes for row in encoder.rows.values())


def test_a_batch_larger_than_the_memory_is_encoded_whole(adapter: Adapter) -> None:
    encoder = PromptEncoder(adapter, capacity=1)
    assert equal(encoder(PROMPTS), encode_in_chunks(adapter, PROMPTS))
    assert encoder.held == 0


def test_no_prompt_is_refused(adapter: Adapter) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        encode_in_chunks(adapter, [])
