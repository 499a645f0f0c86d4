"""What an example of a data set is, for plans and for the estimate of memory: nothing of it is read but columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ..config import DenoisingConfig


@dataclass(frozen=True)
class Width:
    """An example.

    Attributes:
        name: "pair", "picture", "list".
        pictures: that the network sees of it.
    """

    name: str
    pictures: int


class ExampleKinds:
    """What a method on a data set learns from: pairs, or of pairs the chosen pictures.

    Attributes:
        pictures: of an example of pairs that the network sees.
    """

    pictures: ClassVar[int] = 2

    @property
    def is_list(self) -> bool:
        """Whether the loss is one on lists."""
        return False

    @property
    def units(self) -> tuple[str, ...]:
        """What a data set may hold: "pairs", "pictures", "labelled pictures", "ranked lists"."""
        return ("pairs",) if self.pictures == 2 else ("pictures", "pairs")

    @property
    def example(self) -> Width:
        """What an example of the data set is, as far as this disk says it; else a pair."""
        return Width("pair" if self.pictures == 2 else "picture", self.pictures)

    @property
    def most_listed(self) -> int | None:
        """Pictures of a list that are shown; None shows all."""
        return None

    @property
    def makes_lists(self) -> bool:
        """Whether lists are made of the pairs."""
        return False

    def on_lists(self, folder: str) -> DenoisingConfig:
        """The settings with the lists in ``folder``, which were made.

        Raises:
            TypeError: the method has no lists.
        """
        raise TypeError(f"{type(self).__name__} takes no lists")


def example_width(dataset: str, split: str, units: tuple[str, ...], list_size: int | None = None) -> Width:
    """What a data set on this disk holds, by its columns and, of lists, their lengths; else a pair.

    Args:
        units: what the method learns from.
        list_size: pictures of a list that are shown; None shows all.
    """
    from diffusion_align.data.pairs import local_unit

    unit, longest = local_unit(dataset, split)
    if unit not in units or unit == "pairs" or unit is None:
        return Width("pair", 2)
    if unit == "labelled pictures":
        return Width("picture", 1)
    return Width("list", longest if list_size is None else min(list_size, longest))
