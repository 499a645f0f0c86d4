"""Which number format a device computes fast in."""

from __future__ import annotations

import torch


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
