"""Checkpoint files of scorers: found, read without pickle, loaded strictly."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
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


def find_folder(checkpoint: str | Path | None, source: str) -> Path:
    """The folder with *.safetensors files and their configuration: ``checkpoint``, else the repository ``source``, from
    the local cache or fetched.

    Raises:
        FileNotFoundError: neither is there; the message says how to get it.
    """
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
        folder = Path(checkpoint or snapshot_download(source, allow_patterns=wanted))
    except OSError as error:
        raise FileNotFoundError(
            f"{source} is not in the local cache and cannot be fetched ({type(error).__name__}): download it "
            f"('hf download {source}') or give checkpoint=, its folder"
        ) from None
    if not any(folder.glob("*.safetensors")):  # offline, what is left of a broken download is given as it is
        raise FileNotFoundError(
            f"checkpoint {folder}: no .safetensors files: download {source} ('hf download {source}') and give its "
            "folder"
        )
    return folder


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
    """Tensors of a .safetensors or PyTorch file; ``state_dict``, ``model`` and ``module.`` wrappings are taken off.

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
    for wrapping in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"checkpoint {path}: expected a mapping of names to tensors, found {type(content).__name__}")
    return {name.removeprefix("module."): value for name, value in content.items()}


class Husk:
    """Stands for every object of a pickled module that is no tensor: it takes what it is given and does nothing."""

    def __init__(self, *args: object, **options: object) -> None:
        pass


def read_module(path: Path) -> dict[str, Tensor]:
    """Tensors of a file into which a whole module was pickled (``torch.save(model)``), by name.

    Nothing of it is run and no class of it is imported: torch's restricted reader gets an empty class for each name.

    Raises:
        ValueError: the file is torn, or holds no module.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Husk, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, Husk) or "_modules" not in vars(content):
        raise ValueError(f"checkpoint {path}: expected a pickled module, found {type(content).__name__}")
    return dict(_tensors_of(content, ""))


def _tensors_of(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    own = vars(module)
    for name, value in (own["_parameters"] | own["_buffers"]).items():
        if value is not None and name not in own.get("_non_persistent_buffers_set", ()):
            yield prefix + name, value.detach()
    for name, child in own["_modules"].items():
        if child is not None:
            yield from _tensors_of(child, f"{prefix}{name}.")


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
