"""Shards that earlier or interrupted builds left, and the names that new ones get."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .shard_files import BUILDING, MANIFEST, SHARDS, Facts, is_whole, read_json, write_json, write_shard


@dataclass(frozen=True)
class Place:
    """Where a shard lies.

    Attributes:
        name: of its file.
        keys: hash of what it holds.
    """

    name: str
    keys: str


class KnownShards:
    """The shards in a folder, by what they hold.

    Facts of finished shards are in ``shards.json`` and, until the build is done, in a file for each shard: processes
    need not agree about one file.

    Args:
        mark: fingerprint of the model and the transform; shards of others are left alone.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder, self.mark = folder, mark
        self._facts: dict[str, Facts] = {}
        self._taken: set[str] = set()
        records = [read_json(folder / MANIFEST), read_json(folder / SHARDS)]
        for path in sorted((folder / BUILDING).glob("*.safetensors.json")):
            records.append(read_json(path))
        for record in records:
            if record is not None:
                self._taken |= record["shards"].keys()
                if record["fingerprint"] == mark:
                    self._facts |= record["shards"]
        self._names = {facts["keys"]: name for name, facts in sorted(self._facts.items(), reverse=True)}
        self._held: dict[str, str] | None = None
        self._whole: dict[str, bool] = {}

    def place(self, kind: str, number: int, content: str) -> Place:
        """Where a shard lies, or will: an earlier one's file is not written over, since a manifest may name it."""
        keys = hashlib.sha256(content.encode()).hexdigest()
        plain = f"{kind}-{number:05d}.safetensors"
        other = f"{kind}-{number:05d}-{hashlib.sha256((self.mark + keys).encode()).hexdigest()[:8]}.safetensors"
        if self._names.get(keys, "").startswith(f"{kind}-{number:05d}"):
            return Place(self._names[keys], keys)
        return Place(other if plain in self._taken else plain, keys)

    def has(self, place: Place) -> bool:
        """Whether the shard is there, whole."""
        facts = self._facts.get(place.name)
        return facts is not None and facts["keys"] == place.keys and self._is_whole(place.name)

    def write(self, place: Place, tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
        """Write a shard, then what is known of it."""
        facts = {**write_shard(self.folder / place.name, tensors), "keys": place.keys, **more}
        record = {"fingerprint": self.mark, "shards": {place.name: facts}}
        write_json(self.folder / BUILDING / f"{place.name}.json", record)

    def facts(self, place: Place) -> Facts:
        """What is known of a shard that some process wrote, or that was there.

        Raises:
            RuntimeError: nothing: the process that should have written it ended before its time.
        """
        record = read_json(self.folder / BUILDING / f"{place.name}.json")
        facts: Facts | None = self._facts.get(place.name) if record is None else record["shards"][place.name]
        if facts is None or facts["keys"] != place.keys:
            raise RuntimeError(f"{self.folder / place.name} is missing: a process of the cache command ended early")
        return facts

    def holds(self, name: str) -> bool:
        """Whether some whole shard has a picture."""
        if self._held is None:
            self._held = {key: shard for shard in self._facts for key in self._keys(shard)}
        return name in self._held

    def tensors(self, name: str, wanted: list[str]) -> dict[str, Tensor] | None:
        """Encodings of one picture from any whole shard that has them."""
        if self._held is None or name not in self._held:
            return None
        with safe_open(str(self.folder / self._held[name]), framework="pt") as file:
            return {key: file.get_tensor(key) for key in wanted}

    def _keys(self, shard: str) -> list[str]:
        if not shard.startswith("images-") or not self._is_whole(shard):
            return []
        with safe_open(str(self.folder / shard), framework="pt") as file:
            return [key for key in file.keys() if not key.endswith(".flipped")]  # noqa: SIM118

    def _is_whole(self, name: str) -> bool:
        if name not in self._whole:
            self._whole[name] = is_whole(self.folder / name, self._facts[name])
        return self._whole[name]
