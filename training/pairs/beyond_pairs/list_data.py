"""Settings of ranked lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from .width import ExampleKinds

if TYPE_CHECKING:
    from ..config import DPOConfig


@dataclass(frozen=True, kw_only=True)
class ListData(ExampleKinds):
    """What losses on lists are given."""

    list_size: Annotated[int, Field(ge=2)] | None = None
    """Of loss types on lists: pictures of a list that are shown at each visit; longer lists show some of theirs, drawn
    anew. Unset: as many as the longest list has (shorter ones are filled up and masked)."""
    lists_from_pairs: bool = False
    """Of loss types on lists: make lists of the pairs that share a prompt and pictures, in output_dir/lists (for large
    data sets and with cache_dir: diffusion-align data lists). Else pairs are lists of two."""

    @property
    def units(self) -> tuple[str, ...]:
        return ("pairs", "ranked lists") if self.is_list else ("pairs",)

    @property
    def most_listed(self) -> int | None:
        return self.list_size

    @property
    def makes_lists(self) -> bool:
        return self.lists_from_pairs


def check_lists(config: DPOConfig) -> None:
    """Raises ValueError where a setting of lists would do nothing."""
    for name in ("list_size", "lists_from_pairs"):
        if getattr(config, name) and not config.is_list:
            raise ValueError(f"{name} is for losses on lists: loss_type {', '.join(config.loss_types)} takes pairs")
    for name in ("cache_dir", "streaming"):
        if config.lists_from_pairs and getattr(config, name):
            raise ValueError(
                f"lists_from_pairs cannot be used with {name}: make the lists with diffusion-align data lists, and "
                "give their folder as dataset"
            )
