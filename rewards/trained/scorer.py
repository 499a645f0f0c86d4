"""How trained scorers are saved and found again."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from diffusion_align.files import read_object, save_tensors, sealed_folder, verify_folder, write_whole
from diffusion_align.rewards.protocol import RewardScorer
from diffusion_align.rewards.weights import load_exactly, read_weights

CONFIG, WEIGHTS = "scorer.json", "model.safetensors"


class TrainedScorer(RewardScorer):
    """A scorer with ``save_pretrained`` and ``from_pretrained``.

    Attributes:
        kind: names the class in scorer.json.
    """

    kind: ClassVar[str]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON-able arguments of ``build``."""

    @classmethod
    @abstractmethod
    def build(cls, settings: dict[str, Any], folder: Path) -> Self:
        """The scorer with fresh weights; ``folder`` holds what ``save_extras`` left."""

    def trained_module(self) -> nn.Module:
        """Whose weights are trained and saved; frozen parts that can be loaded elsewhere stay out."""
        return self

    def save_extras(self, folder: Path) -> None:
        """Files beside the weights, e.g. the tokenizer."""

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the scorer; returns the folder."""
        record = {"kind": self.kind, "name": self.name, "statistics": self.statistics, "settings": self.settings()}
        with sealed_folder(Path(folder)) as place:
            save_tensors(place / WEIGHTS, self.trained_module().state_dict())
            write_whole(place / CONFIG, json.dumps(record, indent=2).encode() + b"\n")
            self.save_extras(place)
        return place

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what ``save_pretrained`` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the folder holds another kind of scorer, weights that do not fit, or a file that has changed
                since it was written; file and key are named.
        """
        folder = Path(folder)
        verify_folder(folder)
        record = read_config(folder)
        if record["kind"] != cls.kind:
            raise ValueError(f"{folder / CONFIG}: is a scorer of kind {record['kind']!r}, expected {cls.kind!r}")
        scorer = cls.build(record["settings"], folder)
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder / WEIGHTS}: no such file")
        weights = {name: value.float() for name, value in read_weights(folder / WEIGHTS).items()}
        load_exactly(scorer.trained_module(), weights, folder / WEIGHTS)
        scorer.name = record["name"]
        statistics = record["statistics"]
        scorer.statistics = None if statistics is None else (float(statistics[0]), float(statistics[1]))
        return scorer


def scorer_folder(place: str | Path) -> Path:
    """The folder of a saved scorer; of a run or checkpoint that trained one, the one in it."""
    inner = Path(place) / "scorer"
    return inner if inner.is_dir() else Path(place)


def read_config(folder: Path) -> dict[str, Any]:
    """scorer.json of a saved scorer.

    Raises:
        FileNotFoundError, ValueError: it is not there, or not what ``save_pretrained`` writes.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the folder of a saved scorer")
    record = read_object(path)
    missing = {"kind", "name", "statistics", "settings"} - set(record)
    if missing:
        raise ValueError(f"{path}: {sorted(missing)[0]!r} is missing")
    return record
