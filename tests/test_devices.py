"""Which devices get bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_align.devices import computes_bf16, fast_autocast
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.pairs.config import DPOConfig


def without_hardware(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: present)


@pytest.mark.parametrize("present", [True, False])
def test_a_cpu_gets_bf16_only_if_it_computes_it(present: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_hardware(monkeypatch, present)
    assert computes_bf16("cpu") is present
    a = torch.ones(2, 2)
    with fast_autocast("cpu"):
        assert (a @ a).dtype == (torch.bfloat16 if present else torch.float32)
    with fast_autocast("cpu", enabled=False):
        assert (a @ a).dtype == torch.float32
    if not torch.cuda.is_available():
        accelerator = build_accelerator(DPOConfig(output_dir=str(tmp_path), mixed_precision="auto"))
        assert accelerator.mixed_precision == ("bf16" if present else "no")
