"""Seconds, memory, waits and floating-point operations of a step."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffusion_align.adapters import Adapter
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.engine.loop import run_loop
from diffusion_align.training.engine.protocols import Method
from diffusion_align.training.policy.config import TrainConfig

from ..harness import synchronize
from .workshop import Workshop

GIB = 2**30
#: Why a figure is missing on a machine without a GPU.
NO_CUDA = "peak memory and host waits are counted by CUDA alone"


@dataclass(frozen=True)
class StepCost:
    """What an optimiser step costs.

    Attributes:
        seconds: per step.
        peak_gib: most memory that tensors held at once; None without CUDA.
        host_waits: how often the host waited for the device in one step; None without CUDA.
        loss: of the last timed step.
        wait_places: where those waits are, ``file:line``.
        spent: milliseconds by kind of kernel, of one step; empty unless it was asked for.
    """

    seconds: float
    peak_gib: float | None
    host_waits: int | None
    loss: float
    wait_places: tuple[str, ...] = ()
    spent: dict[str, Any] = field(default_factory=dict)

    def figures(self, pairs: int) -> dict[str, Any]:
        return {
            "seconds_per_step": self.seconds,
            "pairs_per_second": pairs / self.seconds,
            "peak_gib": self.peak_gib,
            "host_waits": self.host_waits,
            "loss": self.loss,
            **({"waits_at": places(self.wait_places)} if self.wait_places else {}),
        }


def places(waits: Iterable[str]) -> dict[str, int]:
    """How often the host waited at each ``file:line``."""
    return dict(Counter(waits).most_common())


class Enough(Exception):
    """Enough steps were seen; the loop is left without its last checkpoint and weights."""


@contextmanager
def counted_waits(found: list[str]) -> Iterator[None]:
    """Every wait of the host for the GPU inside is added to ``found``; nothing without CUDA."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]


#: Kinds of kernels, by the first pattern that a kernel's name matches; operators' names on a CPU.
KERNELS = (
    ("attention", r"flash|fmha|attention|sdpa|softmax"),
    ("convolution", r"conv|fprop|dgrad|wgrad|implicit|winograd|xmma_.*nhwc|nchw|nhwc"),
    ("matmul", r"gemm|cutlass|nvjet|cublas|splitk|::mm|addmm|bmm|matmul|linear"),
    ("norm", r"norm|moments|welford"),
    ("copy", r"memcpy|memset|copy|cat|fill|::to|clone|transpose"),
)


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel does, by its name."""
    return next((kind for kind, pattern in KERNELS if re.search(pattern, kernel, re.IGNORECASE)), "elementwise")


@contextmanager
def profiled(found: dict[str, Any]) -> Iterator[None]:
    """Milliseconds of what runs inside: by kind of kernel, the longest kernels, and all that the device was busy.

    On a CPU operators stand in for kernels.
    """
    cuda = torch.cuda.is_available()
    # Without the host's operators: to sort theirs out takes longer than the step.
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        yield
        synchronize()
    spent: dict[str, float] = {}
    for event in seen.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if own > 0 and (not cuda or event.device_type == torch.autograd.DeviceType.CUDA):
            spent[event.key] = spent.get(event.key, 0.0) + own / 1000
    kinds: dict[str, float] = {}
    for kernel, milliseconds in spent.items():
        kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0.0) + milliseconds
    longest = sorted(spent, key=lambda kernel: -spent[kernel])[:8]
    found["busy_ms"] = sum(spent.values())
    found["kinds_ms"] = dict(sorted(kinds.items(), key=lambda kind: -kind[1]))
    found["longest_ms"] = {kernel[:80]: spent[kernel] for kernel in longest}


class Watched:
    """A method between the loop and the real one, that looks at the clock when batches are asked for.

    Asking for batch ``warmup`` starts the clock, asking for batch ``warmup + steps`` stops it; in the step after that
    waits are counted, one more is profiled if ``look``, and then the loop is left.
    """

    def __init__(self, method: Method, warmup: int, steps: int, cuda: bool, look: bool = False) -> None:
        self.method, self.warmup, self.steps, self.cuda, self.look = method, warmup, steps, cuda, look
        self.spent: dict[str, Any] = {}
        self.seconds, self.peak, self.losses = 0.0, None, []  # type: ignore[var-annotated]
        self.waits: list[str] = []

    def batches(self) -> Iterator[Any]:
        source = iter(self.method.batches())
        for _ in range(self.warmup):
            yield next(source)
        synchronize()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(self.steps):
            yield next(source)
        synchronize()
        self.seconds = (time.perf_counter() - started) / self.steps
        self.peak = torch.cuda.max_memory_allocated() / GIB if self.cuda else None
        with counted_waits(self.waits):
            yield next(source)
        if self.look:
            with profiled(self.spent):
                yield next(source)
        raise Enough

    def loss(self, batch: Any) -> Any:
        loss, metrics = self.method.loss(batch)
        self.losses.append(loss.detach())
        return loss, metrics

    def state_dict(self) -> dict[str, Any]:
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state)


def loop_cost(
    shop: Workshop,
    config: TrainConfig,
    adapter: Adapter,
    make: Callable[[Any, Any], Method],
    warmup: int,
    steps: int,
    look: bool = False,
) -> StepCost:
    """What a step of the training loop costs.

    Args:
        make: (config, accelerator) to the method; one micro-step is one batch.
        look: profile one more step.
    """
    config = replace(
        config, output_dir=str(shop.folder / "run"), max_steps=10**6, logging_steps=10**6, save_steps=10**6,
        progress=False, report_to="none", mixed_precision=shop.precision,
    )  # fmt: skip
    accelerator = build_accelerator(config)
    watched = Watched(make(config, accelerator), warmup, steps, shop.cuda, look)
    try:
        run_loop(config, adapter, watched, accelerator)
    except Enough:
        pass
    finally:
        adapter.wrap(lambda module: accelerator.unwrap_model(module, keep_fp32_wrapper=False))
        for parameter in adapter.trainable_parameters().values():
            parameter.grad = None
    waits = len(watched.waits) if shop.cuda else None
    last = float(watched.losses[warmup + steps - 1])
    return StepCost(watched.seconds, watched.peak, waits, last, tuple(watched.waits), watched.spent)


def plain_cost(shop: Workshop, step: Callable[[], torch.Tensor], warmup: int, steps: int) -> StepCost:
    """The same of a bare function that does one optimiser step and gives its loss."""
    for _ in range(warmup):
        step()
    synchronize()
    if shop.cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(steps):
        loss = step()
    synchronize()
    seconds = (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_allocated() / GIB if shop.cuda else None
    found: list[str] = []
    with counted_waits(found):
        step()
    return StepCost(seconds, peak, len(found) if shop.cuda else None, float(loss), tuple(found))


def seconds_of(call: Callable[[], Any], warmup: int = 1, rounds: int = 3) -> float:
    """Median seconds of ``call``."""
    found = []
    for i in range(warmup + rounds):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        if i >= warmup:
            found.append(time.perf_counter() - started)
    return sorted(found)[len(found) // 2]


def peak_of(shop: Workshop, call: Callable[[], Any]) -> float | None:
    """GiB that ``call`` needs at its peak beyond what is there before; None without CUDA."""
    if not shop.cuda:
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def operations_of(call: Callable[[], Any]) -> int:
    """Floating-point operations (a multiply-add is two) of ``call``, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
