"""Reference errors of fixed draws, on the device and in one file: two numbers for each pair and draw."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusion_align.data import FixedDraws
from diffusion_align.devices import send
from diffusion_align.files import write_whole


class ErrorMemory:
    """A table of errors (pairs, D, 2) float32 that is NaN where nothing is known, and its file.

    The file's name is a hash of ``facts``, everything that the errors depend on: other settings have another file, and
    runs that share all facts (say, with other losses or learning rates) share the file. A damaged file is skipped with
    a warning, as if nothing were known, and written again.

    Args:
        folder: where the file is, or will be.
        facts: JSON-able.
        keys: names of all pairs.
        draws: their fixed draws.
        device: where errors are computed; reading and learning never wait for it.

    Attributes:
        known: which rows of the table, one for each pair and draw, are known; on the host.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], keys: Sequence[str], draws: FixedDraws, device: torch.device
    ) -> None:
        self.facts, self.draws = json.dumps(facts, sort_keys=True), draws
        self.path = folder / f"{hashlib.sha256(self.facts.encode()).hexdigest()[:32]}.safetensors"
        self.positions = {key: i for i, key in enumerate(keys)}
        self.shape = (len(keys), draws.count, 2)
        table = self._read()
        self.known: list[bool] = _known(table)
        self._saved = sum(self.known)
        self.table = table.view(-1, 2).to(device)

    def slots(self, keys: Sequence[str], seeds: Tensor) -> list[int]:
        """Rows of the table for pairs ``keys`` with ``seeds`` (B,), a CPU tensor."""
        count = self.draws.count
        named = zip(keys, seeds.tolist(), strict=True)
        return [self.positions[key] * count + self.draws.which(key, seed) for key, seed in named]

    def learn(self, slots: Sequence[int], errors: Tensor) -> None:
        """Note ``errors`` (2, n), chosen and rejected, of ``slots``."""
        self.table[send(torch.tensor(slots), self.table.device)] = errors.T
        for slot in slots:
            self.known[slot] = True

    def recall(self, slots: Sequence[int]) -> Tensor:
        """Errors (2, n) of known ``slots``."""
        return self.table[send(torch.tensor(slots), self.table.device)].T

    def save(self) -> None:
        """Share what all processes learned and write it; called by all of them together."""
        state = PartialState()
        if state.num_processes > 1:
            # Equal draws have equal errors, whoever computed them, so that the larger one is the known one.
            shared = torch.where(self.table.isnan(), -1.0, self.table)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            self.table = torch.where(shared < 0, torch.nan, shared)
        table = self.table.view(self.shape).cpu()
        self.known = _known(table)
        if state.is_main_process and sum(self.known) > self._saved:
            elsewhere = self._read()  # another run with the same facts may have written meanwhile
            self._write(torch.where(table.isnan(), elsewhere, table))
            self._saved = sum(self.known)

    def _read(self) -> Tensor:
        empty = torch.full(self.shape, torch.nan)
        if not self.path.is_file():
            return empty
        try:
            with safe_open(str(self.path), framework="pt") as file:
                table, notes = file.get_tensor("errors").clone(), file.metadata()  # not a map of the file
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{self.path} is skipped, its errors are computed again: {error}", stacklevel=2)
            return empty
        if notes != self._notes(table) or table.shape != self.shape:
            warnings.warn(
                f"{self.path} is skipped, its errors are computed again: its checksum or settings do not match",
                stacklevel=2,
            )
            return empty
        return table

    def _write(self, table: Tensor) -> None:
        write_whole(self.path, save({"errors": table.contiguous()}, self._notes(table)))

    def _notes(self, table: Tensor) -> dict[str, str]:
        digest = hashlib.sha256(table.contiguous().numpy().tobytes()).hexdigest()
        return {"facts": self.facts, "sha256": digest}


def _known(table: Tensor) -> list[bool]:
    known: list[bool] = (~table.isnan()).all(dim=-1).flatten().tolist()
    return known
