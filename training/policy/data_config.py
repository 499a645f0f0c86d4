"""Settings of training data that several kinds of methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from diffusion_align.training.engine.config import NonNegative, Positive


def selection_seed(pair_selection: str, seed: int) -> int | None:
    """What pairs are drawn with; None where the first ones are taken."""
    return seed if pair_selection == "random" else None


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Where the examples come from."""

    dataset: str = "scenes-pairs"
    """Shipped name, hub data set, or file or folder."""
    dataset_split: str = "train"
    """Split to train on."""


@dataclass(frozen=True, kw_only=True)
class PairData(TrainingData):
    """Pairs of pictures."""

    changeable: ClassVar[frozenset[str]] = frozenset({"max_corrupt"})

    max_pairs: Positive | None = None
    """Use only this many pairs."""
    pair_selection: Literal["random", "first"] = "random"
    """Which they are: drawn at random by the seed (streams: by whole row groups), or the first of the data set."""
    max_corrupt: NonNegative = 100
    """How many unreadable images are skipped and reported before the run stops."""


@dataclass(frozen=True, kw_only=True)
class BatchedPairs(PairData):
    """Pairs that are read batch by batch."""

    #: The position in the data is kept in pairs, whatever the size of the batches.
    changeable: ClassVar[frozenset[str]] = frozenset({
        "per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_num_workers",
    })  # fmt: skip

    dataloader_num_workers: NonNegative = 2
    """Threads that read ahead."""


@dataclass(frozen=True, kw_only=True)
class JudgedPairs(BatchedPairs):
    """Pairs that are read batch by batch, and whose verdicts are learned from."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped labels."""
