"""Checkpoint files of scorers: found, read without pickle, loaded strictly."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_scalar: Any = np.dtype("f8").type(0).__reduce__()[0]
#: Training checkpoints of open_clip hold numpy's numbers beside the weights; numpy 1 kept them in another module.
NUMBERS: list[Any] = [
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def find_file(checkpoint: str | Path | None, source: str, filename: str, sha256: str | None = None) -> Path:
    """The weights: ``checkpoint`` (a file, or a folder that holds ``filename``), else the published ones.

    Args:
        source: hub repository that has ``filename``, or the https address of the file itself.
        sha256: how the published file's SHA-256 starts; what is fetched by address is checked against it.

    Raises:
        FileNotFoundError: neither is there; the message says where to get the file.
    """
    if checkpoint is not None:
        path = Path(checkpoint)
        path = path / filename if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {path}: no such file; expected {filename} of {source}")
        return path
    try:
        return _fetch_address(source, filename, sha256) if source.startswith("https:") else _fetch_hub(source, filename)
    except OSError as error:  # huggingface_hub's and urllib's errors are OSErrors
        raise FileNotFoundError(
            f"{filename} is not in the local cache and cannot be fetched from {source} ({type(error).__name__}): "
            "download it there and give checkpoint="
        ) from None


def _fetch_hub(repo: str, filename: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, filename))


def _fetch_address(address: str, filename: str, sha256: str | None) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / filename
    if not path.is_file():
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
            raise OSError("HF_HUB_OFFLINE is set")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256, progress=False)
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or PyTorch file; ``state_dict`` and ``module.`` wrappings are taken off.

    Raises:
        ValueError: the file is torn, or holds something else than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"checkpoint {path}: expected a mapping of names to tensors, found {type(content).__name__}")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_exactly(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Every weight of ``module`` from ``weights``, nothing left over; on the meta device the tensors are taken as is.

    Raises:
        ValueError: missing, unexpected or differently shaped keys; source, counts and the first of them are named.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    shaped = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shaped}
    found = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"checkpoint {source} does not fit {type(module).__name__}: {'; '.join(found)}")
    on_meta = any(value.is_meta for value in own.values())
    module.load_state_dict(dict(weights), strict=True, assign=on_meta)
