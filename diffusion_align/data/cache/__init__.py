"""Latents and prompt embeddings, encoded once: sharded safetensors, keyed by content and model, verified on read."""

from .build import build_cache
from .identity import Cacheable, compare, require_same_data
from .opened import CachedPairs
from .shard_files import CORRUPT, MANIFEST, CacheError, fingerprint, hash_weights, read_manifest
from .upkeep import collect_garbage, damage, garbage

__all__ = [
    "CORRUPT",
    "MANIFEST",
    "CacheError",
    "Cacheable",
    "CachedPairs",
    "build_cache",
    "collect_garbage",
    "compare",
    "damage",
    "fingerprint",
    "garbage",
    "hash_weights",
    "read_manifest",
    "require_same_data",
]
