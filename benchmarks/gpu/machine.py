"""Stage 1: the device itself. Everything after is a share of these."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .measure import seconds_of
from .rows import Finding, Row, Stage
from .workshop import Workshop


def describe(shop: Workshop) -> Finding:
    """Name, memory and versions."""
    figures: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if not shop.cuda:
        return Finding(figures | {"name": f"CPU {platform.machine()}"}, notes=("no GPU",))
    properties = torch.cuda.get_device_properties(shop.device)
    figures |= {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    return Finding(figures)


def matmul(shop: Workshop) -> Finding:
    """TFLOP/s of a large square product, the best of several rounds' medians."""
    side = shop.scale.matmul
    a, b = (torch.randn(side, side, device=shop.device, dtype=shop.dtype) for _ in range(2))
    out = torch.empty_like(a)
    repeats = 20 if shop.scale.true_size else 2

    def call() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    seconds = seconds_of(call, warmup=2, rounds=5) / repeats
    return Finding({"side": side, "dtype": str(shop.dtype), "tflops": 2 * side**3 / seconds / 1e12})


def copy(shop: Workshop) -> Finding:
    """GB/s of a copy on the device (read and written bytes), and from page-locked memory to it."""
    count = shop.scale.copy_bytes
    source = torch.empty(count, dtype=torch.uint8, device=shop.device)
    target = torch.empty_like(source)
    figures: dict[str, Any] = {
        "bytes": count,
        "device_gb_per_second": 2 * count / seconds_of(lambda: target.copy_(source)) / 1e9,
    }
    if not shop.cuda:
        return Finding(figures | {"upload_gb_per_second": None}, notes=("there is no device to upload to",))
    host = torch.empty(count, dtype=torch.uint8).pin_memory()
    seconds = seconds_of(lambda: target.copy_(host, non_blocking=True))
    return Finding(figures | {"upload_gb_per_second": count / seconds / 1e9})


STAGE = Stage(
    "device",
    "The device",
    lambda shop: [Row("description", 1, describe), Row("matmul", 2, matmul), Row("copy", 2, copy)],
)
