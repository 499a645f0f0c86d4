"""Files of a cache: shards of tensors with checksums, the manifest that names them, and what makes them valid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.files import read_object, save_tensors, sha256_of, with_checksum, write_whole

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


class CacheError(ValueError):
    """A cache that cannot be used; the message names the file and how to get a good one."""


def fingerprint(adapter: Adapter, transform: PairTransform) -> str:
    """Hash of everything cached values depend on besides the pairs: encoders' weights and the transform."""
    facts = [transform.settings(), adapter.vae.config.scaling_factor]
    if adapter.vae.use_tiling:  # tiles' latents are others; without them the hash is that of caches from before tiling
        facts.append("tiling")
    if adapter.vae.config.get("latents_mean") is not None:
        facts += [list(adapter.vae.config.latents_mean), list(adapter.vae.config.latents_std)]
    if adapter.vae.config.get("shift_factor"):
        facts.append({"shift_factor": adapter.vae.config.shift_factor})
    if adapter.max_sequence_length is not None:  # what fills a prompt up is attended to
        facts.append({"max_sequence_length": adapter.max_sequence_length})
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
        CacheError: there is none, or it was damaged.
    """
    try:
        return read_object(folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{folder / MANIFEST} is missing or unreadable: run 'diffusion-align cache' ({error})"
        ) from error


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
    save_tensors(path, tensors)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object in one go, with a checksum."""
    write_whole(path, json.dumps(with_checksum(value)).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """What ``write_json`` wrote; None where it is missing or damaged."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return None
