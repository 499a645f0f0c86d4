"""What the CPU finds out while the GPU works: fp32 losses of the product, memory estimates, operations of a step.

Each in a process of its own that sees no GPU; in a ``--small`` run, which has none either, when it is asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from diffusion_align.adapters.families.sdxl import StableDiffusionXL
from diffusion_align.shipped import shipped_path
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.policy.costs.memory import estimate_memory

from ..sdxl import UNET
from ..sdxl_memory import write_configs
from .flow.models import FLUX, SD35
from .measure import operations_of
from .workshop import REHEARSAL, TRUE, Scale, Workshop, write_json

FLOW_MODELS = (SD35, FLUX)
CHECKPOINTING = ("none", "attention", "full")
#: Seconds that a row waits for an answer that is still being worked on.
PATIENCE = 45.0


def memory(batch: int, scale: Scale, folder: Path) -> dict[str, float]:
    """Estimated GiB of a cached LoRA DPO step of ``batch`` pairs, by checkpointing."""
    model = "scenes-sdxl"
    if scale.true_size:
        folder.mkdir(exist_ok=True, parents=True)
        write_configs(folder)
        model = str(folder)
    dtype: Any = "bf16" if scale.true_size else "fp32"
    precision: Any = "bf16" if scale.true_size else "no"
    found = {}
    for kind in CHECKPOINTING:
        checkpointing: Any = kind
        config = DPOConfig(
            model=model, resolution=scale.resolution, per_device_train_batch_size=batch, cache_dir="cache",
            gradient_checkpointing=checkpointing, weight_dtype=dtype, mixed_precision=precision,
        )  # fmt: skip
        estimate = estimate_memory(config)
        assert estimate is not None
        found[kind] = estimate.total / 2**30
    return found


def operations(scale: Scale) -> dict[str, int]:
    """Floating-point operations of one pair's step by checkpointing, counted on the ``meta`` device."""
    family = StableDiffusionXL()
    config = UNET
    if not scale.true_size:
        config = UNet2DConditionModel.load_config(shipped_path("scenes-sdxl"), subfolder="unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        unet.requires_grad_(False).add_adapter(LoraConfig(r=8, target_modules=list(family.lora_targets)))
    unet.to("meta").train()
    inputs = family.memory_inputs(unet, 2, unet.config.sample_size)

    def forward() -> torch.Tensor:
        return family.call(unet, inputs)

    unet.disable_adapters()
    with torch.no_grad():
        reference = operations_of(forward)
    unet.enable_adapters()
    found = {}
    for kind in CHECKPOINTING:
        unet.disable_gradient_checkpointing()
        if kind != "none":
            family.recompute(unet, attention_only=kind == "attention")
        found[kind] = reference + operations_of(lambda: forward().sum().backward())
    return found


def find_out(key: str, scale: Scale, folder: Path) -> dict[str, Any]:
    """The answer to "operations", "memory-BATCH", "flow-MODEL" or "losses-METHOD"."""
    from .flow.stage import estimates
    from .product import run_steps

    what, _, which = key.partition("-")
    if what == "operations":
        return operations(scale)
    if what == "flow":
        return estimates(which, scale, folder / key)
    if what == "memory":
        return memory(int(which), scale, folder / key)
    return run_steps(which, scale, folder / key, "no")


def start_helpers(shop: Workshop) -> None:
    """Start the processes beside this one; none for a small run."""
    if not shop.scale.true_size:
        return
    folder = shop.folder / "cpu"
    folder.mkdir(parents=True)
    keys = (
        "losses-dpo",
        "losses-inpo",
        "operations",
        *(f"memory-{batch}" for batch in shop.scale.batches),
        *(f"flow-{name}" for name in FLOW_MODELS),
    )
    for key in keys:
        command = [sys.executable, "-m", "benchmarks.gpu.reference", key, shop.scale.name, str(folder)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
        with (folder / f"{key}.log").open("w") as log:
            shop.helpers[key] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def stop_helpers(shop: Workshop) -> None:
    """End those that still work."""
    for process in shop.helpers.values():
        process.kill()
        process.wait()


def answer(shop: Workshop, key: str) -> dict[str, Any]:
    """What the CPU found out; empty if its process failed or takes longer than a row waits."""
    if not shop.scale.true_size:
        if key not in shop.answers:
            shop.answers[key] = find_out(key, shop.scale, shop.folder / "cpu")
        return shop.answers[key]
    path, deadline = shop.folder / "cpu" / f"{key}.json", time.monotonic() + PATIENCE
    while not path.is_file() and shop.helpers[key].poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    if path.is_file():
        return dict(json.loads(path.read_text()))
    print(f"no {key} from the CPU: {(shop.folder / 'cpu' / f'{key}.log').read_text()[-400:]}", flush=True)
    return {}


if __name__ == "__main__":
    wanted, size, where = sys.argv[1:]
    found = find_out(wanted, {scale.name: scale for scale in (TRUE, REHEARSAL)}[size], Path(where))
    write_json(Path(where) / f"{wanted}.json", found)
