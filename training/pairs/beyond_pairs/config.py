"""Settings of learning from labelled pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from diffusion_align.objectives.declared import declared
from diffusion_align.training.engine.config import PositiveFloat
from diffusion_align.training.policy.config import MemoryNeeds, Work

from ..config import ReferencedConfig
from ..switches.config import check_order
from .width import Width, example_width

if TYPE_CHECKING:
    LossType = str
else:
    LossType = Literal[declared("unpaired_loss")]

#: Why labelled pictures need an order of their own.
TOGETHER = "shared_noise brings labelled pictures of a caption together"

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class KTOConfig(ReferencedConfig):
    """Diffusion-KTO (2404.04465) and BCO: pictures that are liked or not, without pairs."""

    method: ClassVar[str] = "kto"

    # -- data
    dataset: str = "scenes-pairs"
    """Pictures with a label (columns image, caption, label; or a folder with sub-folders liked and disliked, docs/
    data.md), or pairs, whose chosen images are liked and whose rejected ones are disliked: shipped name, hub data set,
    parquet file or folder, or an image folder with metadata.jsonl/.csv."""
    positive_ratio: Share | None = None
    """Take one image of each pair, the liked one with this probability (the official code's is 0.8); unset: both."""
    shared_noise: bool = False
    """Bring the pictures of a caption together, and give those of a batch the same timestep and noise (a pair's two,
    or liked and disliked ones of a prompt): what they have in common then cancels; false: each its own (the official
    code)."""

    # -- objective
    loss_type: LossType = "kto"
    """Loss (docs/dpo.md has the table)."""
    beta: PositiveFloat = 5000.0
    """Strength of the pull to the reference; rewards are 0.5 * beta * s. (The official Diffusion-KTO code has no
    0.5: its 1000 is 2000 here.)"""
    desirable_weight: PositiveFloat = 1.0
    """Factor of the losses of liked images."""
    undesirable_weight: PositiveFloat = 1.0
    """Factor of the losses of disliked images."""
    shift_decay: Share = 0.99
    """Share of the mean reward, which rewards are compared with, that stays at each micro-step."""

    @property
    def units(self) -> tuple[str, ...]:
        return ("pairs", "labelled pictures")

    @property
    def example(self) -> Width:
        return example_width(self.dataset, self.dataset_split, self.units)

    @property
    def drawn(self) -> int:
        """Images that are trained on, of each example."""
        return self.example.pictures if self.positive_ratio is None else 1

    def check(self) -> None:
        super().check()
        if self.shared_noise and self.positive_ratio is not None:
            raise ValueError(
                "shared_noise gives the pictures of a caption the same noise, and positive_ratio takes one of each "
                "pair: unset positive_ratio, or set shared_noise to false"
            )
        if self.shared_noise and self.example.pictures == 1:
            check_order(self, TOGETHER)

    def memory_needs(self) -> MemoryNeeds:
        return replace(super().memory_needs(), rows=self.drawn)

    def work(self) -> Work:
        whole, share = super().work(), self.drawn / self.example.pictures
        forward = {name: calls * share for name, calls in whole.forward.items()}
        return replace(whole, trained=self.drawn, forward=forward)
