"""Names of dtypes, choice of device, and whether bfloat16 is fast there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def computes_bf16(device: torch.device | str) -> bool:
    """Whether ``device`` multiplies bfloat16 in hardware.

    Others emulate it: a CPU without AVX-512 BF16 or AMX needs fifty times the time of float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # torch has no public question for it (2.15)
        return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
    return False


def fast_autocast(device: torch.device | str, enabled: bool = True) -> torch.autocast:
    """Autocast to bfloat16 where that is faster, a context without effect elsewhere."""
    device = torch.device(device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled and computes_bf16(device))


def autocast_dtype(device: torch.device | str) -> torch.dtype | None:
    """The dtype that autocast computes in on ``device`` right now; None outside of it."""
    kind = torch.device(device).type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch.compile (2.11) cannot trace is_autocast_available
        return None
    return torch.get_autocast_dtype(kind)


def no_autocast(device: torch.device | str) -> AbstractContextManager[Any]:
    """Inside, every operation takes its operands as they are."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(torch.device(device).type, enabled=False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device's memory, or the host's, is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``, without waiting for the work that is queued there.

    A plain ``.to(device)`` of a CPU tensor lets the host wait until the GPU has caught up. Page-locked memory is what
    it copies from on its own; torch keeps that memory until the copy is done. The tensor must not be changed in place
    afterwards.
    """
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))  # torch 2.15: not safe on MPS


def pick_device(name: str) -> torch.device:
    """The named device, or for "auto" the best one that is there."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
