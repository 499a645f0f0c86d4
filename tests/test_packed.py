"""Weights in few bits: what is rounded, how far, and what stays exact."""

from __future__ import annotations

import pytest
import torch

from diffusion_align.packed import SMALL, from_bytes, pack, quantise, to_bytes, unpack

WIDTH = 64


def matrix(seed: int, scale: float = 1.0) -> torch.Tensor:
    """(64, 64) float16."""
    return (scale * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))).half()


@pytest.mark.parametrize("bits", [2, 5, 7, 8])
def test_rows_are_rounded_to_the_nearest_of_their_levels(bits: int) -> None:
    values = matrix(0)
    restored = unpack(pack({"w": values}, row_bits=bits))["w"]
    step = values.float().abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    # Half a step, the scale's own rounding (bfloat16) times the levels, and the result's (float16).
    allowed = step * (0.5 + 2**-9 * 2 ** (bits - 1)) + values.float().abs() * 2**-10
    assert bool(((restored.float() - values.float()).abs() <= allowed).all())
    assert restored.dtype == torch.float16


def test_a_difference_is_as_fine_as_it_is_small() -> None:
    parent = {"w": matrix(0)}
    child = {"w": (parent["w"].float() + 0.01 * matrix(1).float()).half()}
    error = unpack(pack(child, parent, difference_bits=8), parent)["w"].float() - child["w"].float()
    alone = unpack(pack(child, row_bits=8))["w"].float() - child["w"].float()
    assert error.abs().mean() < 0.1 * alone.abs().mean()


def test_what_equals_the_parents_is_not_stored() -> None:
    parent = {"w": matrix(0), "steps": torch.tensor(7)}
    packed = pack(parent, parent)
    assert sum(value.numel() for value in packed.values()) == 0
    restored = unpack(packed, parent)
    assert all(torch.equal(restored[key], parent[key]) for key in parent)


def test_vectors_small_matrices_and_other_dtypes_stay_exact() -> None:
    state = {
        "bias": matrix(0)[0],
        "statistics": matrix(1)[: SMALL // WIDTH - 1],
        "doubles": matrix(2).double(),
        "count": torch.arange(5),
        "scalar": torch.tensor(2.5).half(),
    }
    restored = unpack(from_bytes(to_bytes(pack(state)), "file"))
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[key], state[key]) and restored[key].dtype == state[key].dtype for key in state)


def test_a_tensor_of_another_shape_than_the_parents_stays_exact() -> None:
    child = {"conv_in": torch.randn(48, 9, 3, 3, generator=torch.Generator().manual_seed(0)).half()}
    parent = {"conv_in": torch.zeros(48, 4, 3, 3).half()}
    assert torch.equal(unpack(pack(child, parent), parent)["conv_in"], child["conv_in"])


def test_a_row_of_zeros_stays_zero() -> None:
    values = matrix(0)
    values[3] = 0
    assert unpack(pack({"w": values}))["w"][3].abs().max() == 0


def test_convolutions_have_one_scale_per_output_channel() -> None:
    kernel = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    integers, scale = quantise("w", kernel, 7)
    assert scale.shape == (32,)
    assert integers.shape == kernel.shape
    assert bool((integers.flatten(1).abs().amax(dim=1) == 63).all())


def test_differences_below_float16s_normal_range_survive() -> None:
    parent = {"w": torch.full((WIDTH, WIDTH), 1e-4).half()}
    child = {"w": (parent["w"].float() + 2e-6 * matrix(0).float()).half()}
    error = unpack(pack(child, parent, difference_bits=8), parent)["w"].float() - child["w"].float()
    assert error.abs().max() < 1.5e-7  # float16's step there is 6e-8


def test_packed_bytes_are_read_back_as_they_were() -> None:
    packed = pack({"w": matrix(0), "bias": matrix(1)[0]})
    again = from_bytes(to_bytes(packed), "file")
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[key], packed[key]) for key in packed)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"row_bits = {bits}: expected 2 to 8"):
        pack({"w": matrix(0)}, row_bits=bits)


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    values = matrix(0)
    values[1, 1] = torch.inf
    with pytest.raises(ValueError, match=r"layer\.w: a weight that is not finite"):
        pack({"layer.w": values})


@pytest.mark.parametrize("parent", [None, {}, {"w": torch.zeros(2, 2).half()}], ids=["none", "without it", "smaller"])
def test_a_difference_without_its_parent_is_refused_by_name(parent: dict[str, torch.Tensor] | None) -> None:
    packed = pack({"w": matrix(0)}, {"w": matrix(1)})
    with pytest.raises(ValueError, match="w: "):
        unpack(packed, parent)


def test_torn_bytes_are_refused_by_the_files_name() -> None:
    with pytest.raises(ValueError, match=r"model\.packed: cannot be read as packed weights"):
        from_bytes(to_bytes(pack({"w": matrix(0)}))[:-100], "model.packed")
