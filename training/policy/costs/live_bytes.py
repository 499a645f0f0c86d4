"""Counting the bytes of tensors that are alive at once, also of tensors without data (torch's ``meta`` device)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only

CONVOLUTIONS = frozenset({torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default})


class LiveBytes(TorchDispatchMode):
    """Inside ``with LiveBytes() as live``, storages that operations make are counted until they are freed.

    What was there before is not counted. The backward pass is counted, too, on the CPU and on ``meta``, where it runs
    in the caller's thread. Of what kernels need while they run, convolutions' part is counted: cuDNN and oneDNN copy
    what goes in and what comes out into a layout of their own. At a VAE's largest layers that is a quarter of all
    (docs/performance.md measures it).

    Attributes:
        now: bytes that are alive.
        peak: most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # A view, or what is changed in place, has a storage that an argument had: it may be older than the count.
        older = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            if tensor.untyped_storage()._cdata not in older:
                self._count(tensor.untyped_storage())
        if func in CONVOLUTIONS:
            copies = sum(tensor.nbytes for tensor in _tensors((args, output)) if tensor.ndim > 1)
            self.peak = max(self.peak, self.now + copies)
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class AutocastShapes(TorchFunctionMode):
    """Inside, tensors on ``meta`` have the dtypes that CUDA's autocast to ``dtype`` gives them; None changes nothing.

    ``torch.autocast`` knows no ``meta``. Products are taken in ``dtype``, norms and softmax in float32: of a norm,
    autograd keeps a float32 copy of its input, which is more than the layer's own precision would tell.
    """

    FLOAT32 = frozenset({nn.functional.group_norm, nn.functional.layer_norm, nn.functional.softmax})
    LOWER = frozenset({nn.functional.linear, nn.functional.conv2d, torch.matmul, torch.bmm, torch.baddbmm})

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        dtype = torch.float32 if func in self.FLOAT32 else self.dtype
        if self.dtype is None or func not in self.FLOAT32 | self.LOWER:
            return func(*args, **(kwargs or {}))

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return func(*map(cast, args), **{name: cast(value) for name, value in (kwargs or {}).items()})


@dataclass(frozen=True)
class _Shape:
    """What is known of a tensor without data."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def new(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


def _shape_of(value: Any) -> Any:
    """Of a tensor its shape, of anything else itself."""
    return _Shape(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


class RememberedShapes(TorchDispatchMode):
    """Inside, torch's rules for shapes are asked once for each operation on ``meta`` tensors of such shapes.

    The rules are written in Python, and are most of what a step on ``meta`` takes. A network repeats its layers, so the
    same questions come again and again: SDXL's come ten times.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Hashable, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, structure = tree_flatten((args, kwargs))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        if devices != {"meta"} or not _repeatable(func):
            return func(*args, **kwargs)
        # An int, a float and a bool may be equal, and make other dtypes.
        key = (func, structure, tuple((type(leaf), _shape_of(leaf)) for leaf in leaves))
        if key not in self._known:
            output = func(*args, **kwargs)
            self._known[key] = tree_map(_shape_of, output)
            return output
        return args[0] if func._schema.is_mutable else tree_map_only(_Shape, _Shape.new, self._known[key])


@cache
def _repeatable(func: Any) -> bool:
    """Whether all that ``func`` does on ``meta`` follows from shapes: it returns new tensors, or its first argument as
    that was. Views are neither, and quick."""
    schema = func._schema
    if not schema.is_mutable:
        return all(returned.alias_info is None for returned in schema.returns)
    first, *others = schema.arguments
    written = first.alias_info is not None and first.alias_info.is_write
    alone = len(schema.returns) == 1 and not any(other.alias_info for other in others)
    return written and alone and torch.Tag.inplace_view not in func.tags


class _FlashShapes(torch.autograd.Function):
    """Attention that keeps what flash kernels keep (inputs, output, row sums), never the L x L matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        rows = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def flash_attention_shapes() -> Iterator[None]:
    """Inside, attention on ``meta`` has the outputs and the memory of a flash kernel; values are not computed."""
    original = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _FlashShapes.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original
