"""How many names of a LoRA file ComfyUI's own code finds.

ComfyUI is not part of this repository: clone github.com/comfyanonymous/ComfyUI and name its folder. Of it, the key map
(``comfy/lora.py``, ``comfy/utils.py``), the detection of a UNet's layout and the LoRA readers are run. What they import
and do not use here (devices, samplers, models of other kinds) is replaced by empty modules, in a process of its own.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tests.original_layout import unet_tensors

from .watched import run_watched

NOT_USED = ("model_management", "model_base", "supported_models", "supported_models_base")
PREFIX = "model.diffusion_model."


def keys_found(comfyui: Path, lora: Path, pipeline: Path) -> dict[str, int]:
    """Names that ComfyUI's LoRA loader finds, all names, and weights that it changes.

    Args:
        pipeline: folder with the config of the UNet that the LoRA is for.
    """
    output = run_watched(lambda: print(json.dumps(count(comfyui, lora, pipeline))), "ComfyUI's LoRA loader").output
    found: dict[str, int] = json.loads(output.splitlines()[-1])
    return found


class Empty(ModuleType):
    """A module in which every name is a class that nothing is an instance of."""

    def __getattr__(self, name: str) -> type:
        return type(name, (), {})


class Lost(logging.Handler):
    """Counts the loader's warnings: one for each name that it does not know."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("lora key not loaded")


def count(comfyui: Path, lora: Path, pipeline: Path) -> dict[str, int]:
    """``keys_found`` in this process."""
    sys.path.insert(0, str(comfyui))
    package = import_module("comfy")
    for name in NOT_USED:
        sys.modules[f"comfy.{name}"] = Empty(name)
        setattr(package, name, sys.modules[f"comfy.{name}"])
    sys.modules.setdefault("einops", Empty("einops"))
    key_map, detection, convert = (
        import_module(f"comfy.{name}") for name in ("lora", "model_detection", "lora_convert")
    )
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(pipeline, subfolder="unet"))
    weights = unet_tensors(unet)
    model = SimpleNamespace(
        state_dict=lambda: {"diffusion_model." + name.removeprefix(PREFIX): w for name, w in weights.items()},
        model_config=SimpleNamespace(unet_config=detection.detect_unet_config(weights, PREFIX)),
    )
    lost = Lost()
    logging.getLogger().addHandler(lost)
    state = convert.convert_lora(load_file(lora))
    places = key_map.model_lora_keys_unet(model, {})
    patches = key_map.load_lora(state, places)
    known = model.state_dict().keys()
    assert patches.keys() <= known, "ComfyUI's map leads to weights that the model has not"
    return {"names": len(state), "found": len(state) - lost.count, "weights": len(patches)}
