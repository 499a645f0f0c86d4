"""Files of a cache: shards of tensors with checksums, the manifest that names them, and what makes them valid."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align.adapters import Adapter

from ..transforms import PairTransform

MANIFEST = "manifest.json"
#: Facts of shards by their names, without a finished manifest.
SHARDS = "shards.json"
#: Folder of what an unfinished build knows.
BUILDING = ".building"
#: The list of pairs that could not be read.
CORRUPT = "corrupt_pairs.jsonl"

#: What is known of a shard: bytes, sha256, keys (hash of what it holds), and names of unreadable pictures in it.
Facts = dict[str, Any]


class CacheError(RuntimeError):
    """A cache that cannot be used; the message names the file and how to get a good one."""


def fingerprint(adapter: Adapter, transform: PairTransform) -> str:
    """Hash of everything cached values depend on besides the pairs: encoders' weights and the transform."""
    facts = [transform.settings(), adapter.vae.config.scaling_factor]
    if adapter.vae.use_tiling:  # tiles' latents are others; without them the hash is that of caches from before tiling
        facts.append("tiling")
    if adapter.vae.config.get("latents_mean") is not None:
        facts += [list(adapter.vae.config.latents_mean), list(adapter.vae.config.latents_std)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for module in (adapter.vae, *adapter.text_encoders):
        hash_weights(digest, module.state_dict())
    return digest.hexdigest()


def hash_weights(digest: Any, state: Mapping[str, Tensor]) -> None:
    """Add names and values of ``state`` to a digest of ``hashlib``."""
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
        CacheError: there is none.
    """
    try:
        record: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CacheError(f"{folder / MANIFEST} is missing or unreadable: run 'diffusion-align cache'") from error
    return record


def shard_problem(path: Path, facts: Facts) -> str | None:
    """What the size of a shard says against it."""
    found = path.stat().st_size if path.is_file() else 0
    return None if found == facts["bytes"] else f"{path} has {found} bytes, expected {facts['bytes']}"


def is_whole(path: Path, facts: Facts) -> bool:
    """Whether a shard opens and has its checksum."""
    try:
        with safe_open(str(path), framework="pt"):
            return sha256_of(path) == facts["sha256"]
    except (OSError, SafetensorError):
        return False


def write_shard(path: Path, tensors: dict[str, Tensor]) -> Facts:
    """Write a shard in one go; returns its bytes and checksum."""
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial)
    os.replace(partial, path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one go."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
