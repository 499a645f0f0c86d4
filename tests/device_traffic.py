"""A device that holds no values, so that every time the host waits for it can be seen: torch's ``meta`` device."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

#: Operations whose result's shape depends on values.
VALUE_SHAPED = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default}

INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
WATCHED = {aten._local_scalar_dense.default, aten._to_copy.default, aten.copy_.default, *VALUE_SHAPED, *INDEXING}


class Traffic(TorchDispatchMode):
    """Notes every wait of the host for the ``meta`` device, and answers with zeros so that the work goes on.

    A wait is: reading a value; a copy from or to the CPU that is not asked to go on alone (``non_blocking``), also the
    hidden one of indexing with a CPU tensor; an operation whose shape depends on values.

    Attributes:
        waits: the operation and where in this project it was called, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in WATCHED:
            return function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.is_meta for tensor in tensors)
        if function is aten._local_scalar_dense.default and on_device:
            self._note(function)
            return torch.zeros((), dtype=tensors[0].dtype).tolist()
        if function is aten._to_copy.default:
            source, target = tensors[0], torch.device(kwargs.get("device") or tensors[0].device)
            if source.is_meta and target.type == "cpu":
                if not kwargs.get("non_blocking"):
                    self._note(function)
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            if not source.is_meta and target.type == "meta" and not kwargs.get("non_blocking"):
                self._note(function)
        if function is aten.copy_.default and tensors[0].is_meta != tensors[1].is_meta:
            if not (tensors[0].is_meta and len(args) > 2 and args[2]):
                self._note(function)
            return tensors[0]
        if function in VALUE_SHAPED and on_device:
            self._note(function)
            return torch.zeros((0, tensors[0].ndim), dtype=torch.long, device="meta")
        if function in INDEXING and on_device:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices) or not all(index.is_meta for index in indices):
                self._note(function)
        return function(*args, **kwargs)

    def _note(self, function: Any) -> None:
        frames = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
        ours = [frame for frame in frames if not frame.filename.endswith("device_traffic.py")]
        self.waits.append(f"{function} at {ours[-1].filename.rsplit('/', 2)[-1]}:{ours[-1].lineno}")
