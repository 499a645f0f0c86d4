"""Weights in few bits: a row's numbers as small integers and one scale, or its difference to another model's row.

Pure functions on state dicts. A packed state dict has, for every tensor ``key`` of the original, one of

- ``key``: the tensor itself (vectors, small ones, integers, whatever is not float16);
- ``key|rows`` int8 and ``key|scale`` bfloat16 (one per row): integer times scale;
- ``key|difference`` int8 and ``key|scale``: the parent's tensor plus integer times scale;
- ``key|same``, empty: the parent's tensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor

#: Bits of an integer, its sign included. Fine-tuning moves weights by a sixth of their size or so: a difference of 6
#: bits is finer than a row of 8.
ROW_BITS, DIFFERENCE_BITS = 7, 6

#: Tensors with fewer numbers stay as they are: statistics and small heads are worth more than their bytes.
SMALL = 2048


def pack(
    state: Mapping[str, Tensor],
    parent: Mapping[str, Tensor] | None = None,
    *,
    row_bits: int = ROW_BITS,
    difference_bits: int = DIFFERENCE_BITS,
) -> dict[str, Tensor]:
    """``state`` in few bits, its float16 matrices rounded to nearest.

    Args:
        state: tensors by name; those of other dtypes than float16 are kept exactly.
        parent: as ``unpack`` will get it. A kernel that it has in another shape is kept exactly, a matrix packed
            by itself.
        row_bits, difference_bits: of an integer, 2 to 8, for tensors that the parent lacks and for those that it has.

    Raises:
        ValueError: bits out of range, or a number that is not finite.
    """
    for name, bits in (("row_bits", row_bits), ("difference_bits", difference_bits)):
        if not 2 <= bits <= 8:
            raise ValueError(f"{name} = {bits}: expected 2 to 8")
    packed: dict[str, Tensor] = {}
    for key, value in state.items():
        base = None if parent is None else parent.get(key)
        if base is not None and base.dtype == value.dtype and torch.equal(base, value):
            packed[f"{key}|same"] = torch.empty(0, dtype=torch.int8)
        elif value.dtype != torch.float16 or value.ndim < 2 or value.numel() < SMALL:
            packed[key] = value.contiguous()
        elif base is None or (base.shape != value.shape and value.ndim == 2):
            packed[f"{key}|rows"], packed[f"{key}|scale"] = quantise(key, value.float(), row_bits)
        elif base.shape != value.shape:  # a first layer that sees more: its inputs differ too much for one scale
            packed[key] = value.contiguous()
        else:
            difference = value.float() - base.float()
            packed[f"{key}|difference"], packed[f"{key}|scale"] = quantise(key, difference, difference_bits)
    return packed


def quantise(key: str, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``values`` (R, ...) float32 as integers, int8 of the same shape in [-L, L], L = 2^(bits-1) - 1, and scales (R,).

    The scale is a row's largest magnitude over L, in bfloat16: a difference's would be too small for float16.
    """
    if not bool(values.isfinite().all()):
        raise ValueError(f"{key}: a weight that is not finite cannot be packed")
    levels = 2 ** (bits - 1) - 1
    scale = (values.flatten(1).abs().amax(dim=1) / levels).bfloat16()
    step = per_row(scale, values)
    integers = torch.where(step > 0, values / step, 0.0).round().clamp(-levels, levels)
    return integers.to(torch.int8).contiguous(), scale


def per_row(scale: Tensor, values: Tensor) -> Tensor:
    """Scales (R,) in float32, shaped to multiply ``values`` (R, ...)."""
    return scale.float().reshape(-1, *[1] * (values.ndim - 1))


def unpack(packed: Mapping[str, Tensor], parent: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of ``pack``, float16 where it was packed; the same bits on every machine.

    Raises:
        ValueError: not what ``pack`` gives, or a tensor that only the ``parent`` has and it lacks.
    """
    state: dict[str, Tensor] = {}
    for name, value in packed.items():
        key, _, how = name.partition("|")
        if how == "scale":
            continue
        if how in ("same", "difference") and (parent is None or key not in parent):
            raise ValueError(f"{key}: is packed as a difference to a tensor that the parent does not have")
        if how == "":
            state[key] = value
        elif how == "same":
            assert parent is not None
            state[key] = parent[key]
        elif how in ("rows", "difference") and f"{key}|scale" in packed:
            restored = value.float() * per_row(packed[f"{key}|scale"], value)
            if how == "difference":
                assert parent is not None
                if parent[key].shape != value.shape:
                    raise ValueError(f"{key}: the parent's has shape {[*parent[key].shape]}, expected {[*value.shape]}")
                restored = parent[key].float() + restored
            state[key] = restored.half()
        else:
            raise ValueError(f"{name}: is no part of packed weights")
    return state


def to_bytes(packed: Mapping[str, Tensor]) -> bytes:
    """A packed state dict as safetensors, compressed in two streams: its table, and its numbers.

    Rounded weights repeat nothing, but small ones are frequent: coding single bytes makes them smallest.
    """
    content = save(dict(packed))
    table = 8 + int.from_bytes(content[:8], "little")
    coder = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    return zlib.compress(content[:table], 9) + coder.compress(content[table:]) + coder.flush()


def from_bytes(content: bytes, name: str) -> dict[str, Tensor]:
    """What ``to_bytes`` wrote; ``name`` is the file's, for messages.

    Raises:
        ValueError: the bytes are torn, or something else.
    """
    try:
        table = zlib.decompressobj()
        return load(table.decompress(content) + zlib.decompress(table.unused_data))
    except Exception as error:  # zlib and safetensors have their own kinds
        raise ValueError(f"{name}: cannot be read as packed weights ({error})") from error
