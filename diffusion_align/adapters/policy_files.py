"""A policy's weights in files, as diffusers users load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict

LORA_FILE = "pytorch_lora_weights.safetensors"


def save_lora(pipeline: Any, network_name: str, folder: Path) -> Path:
    """Write the network's LoRA for ``pipeline.load_lora_weights(folder)``; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    network = getattr(pipeline, network_name)
    layers = {f"{network_name}_lora_layers": get_peft_model_state_dict(network)}
    pipeline.save_lora_weights(folder, **layers, **_collate_lora_metadata({network_name: network}))
    return folder / LORA_FILE


def save_network(pipeline: Any, network_name: str, folder: Path) -> Path:
    """Write all weights for ``from_pretrained(folder, subfolder=network_name)``; returns the network's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    getattr(pipeline, network_name).save_pretrained(folder / network_name)
    return folder / network_name


def load_policy(pipeline: Any, network_name: str, path: Path) -> None:
    """Load what was saved above, or any diffusers LoRA or network folder, into the pipeline.

    Raises:
        FileNotFoundError: neither a LoRA file nor the network's folder is there.
        ValueError: a network of another architecture.
    """
    if path.is_file() or (path / LORA_FILE).is_file():
        file = path if path.is_file() else path / LORA_FILE
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        return
    network = getattr(pipeline, network_name)
    source = path / network_name if (path / network_name).is_dir() else path
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no weights: expected {LORA_FILE} or a {network_name!r} folder")
    weights = type(network).from_pretrained(source).state_dict()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit this model: {str(error).splitlines()[1].strip()}") from None
