"""What tests of LoRAs share: policies that are no longer what they start as, and pictures by us and by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample

PROMPTS = ["a large red star on a dark background", "two small blue rings"]
SEEDS = [1, 2]
DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"


def stirred(adapter: Adapter, seed: int = 0) -> Adapter:
    """A policy whose trained weights are no longer what they start as."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.trainable_parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapter


def trained(folder: Path, seed: int = 0, **options: Any) -> Adapter:
    return stirred(load_adapter(folder).train_lora(**{"rank": 4, **options}), seed)


def drawn(pipeline: Any) -> Tensor:
    """Two images by the pipeline itself."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(PROMPTS, num_inference_steps=3, guidance_scale=5.0, generator=generators, output_type="pt").images


def ours(adapter: Adapter, strength: float = 1.0) -> Tensor:
    options = SamplingOptions(alignment_strength=strength)
    return sample(adapter, PROMPTS, num_inference_steps=3, seeds=SEEDS, options=options).images


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def as_comfyui_applies(pipeline: Any, file: Path) -> Any:
    """Every weight that the file's names lead to, plus alpha / r up @ down: kohya's rule, by ComfyUI's and A1111's map.

    The map: ``lora_unet_``, and the name of a diffusers UNet's weight with underscores.
    """
    state = load_file(file)
    weights = {
        "lora_unet_" + name.removesuffix(".weight").replace(".", "_"): weight
        for name, weight in pipeline.unet.state_dict().items()
        if name.endswith(".weight")
    }
    names = {key.split(".")[0] for key in state}
    assert names <= weights.keys()
    assert len(state) == 3 * len(names)
    for name in names:
        down, up, alpha = (state[f"{name}.{kind}"] for kind in ("lora_down.weight", "lora_up.weight", "alpha"))
        change = up.flatten(1) @ down.flatten(1) * (alpha / len(down))
        weights[name] += change.view(weights[name].shape)
    return pipeline
