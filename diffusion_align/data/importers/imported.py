"""What a reader of another format says of a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

#: An encoded picture, or its name in the folder or archive that is read.
Picture: TypeAlias = bytes | str


@dataclass(frozen=True)
class ImportedPair:
    """One judged pair.

    Attributes:
        pictures: of sides 0 and 1.
        label_0: P(picture 0 is preferred): 1, 0 or 0.5 (a tie); None: nobody judged.
        where: what messages call it.
        uids: names of the pictures; None: they are made of their bytes.
        models: that drew them.
        votes: for either picture.
        user_id: who judged.
        ranking_id: pairs of one ranking have the same.
        num_example_per_prompt: pairs that share the weight of one.
        confidence: how sure the set says that its label is.
        both_bad: the tie means that neither picture is good.
        aspects: P(picture 0 is better) by aspect.
    """

    pictures: tuple[Picture, Picture]
    caption: str
    label_0: float | None
    where: str
    uids: tuple[str, str] | None = None
    models: tuple[str, str] | None = None
    votes: tuple[int, int] | None = None
    user_id: str | None = None
    ranking_id: str | None = None
    num_example_per_prompt: int = 1
    confidence: float | None = None
    both_bad: bool = False
    aspects: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What is to be read.

    Attributes:
        split: of the set.
        rank_best: which rank is the best picture's, the lowest or the highest, where a set does not say so itself.
    """

    split: str = "train"
    rank_best: Literal["lowest", "highest"] | None = None


def label_of_ranks(first: float, second: float, best: Literal["lowest", "highest"]) -> float:
    """P(the first is preferred) of two ranks: 1, 0, or 0.5 where they are equal."""
    if first == second:
        return 0.5
    return float((first < second) == (best == "lowest"))


def text_of(value: object, where: str, name: str) -> str:
    """A cell that must be text with something in it.

    Raises:
        ValueError: it is not; row and column are named.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {name} = {value!r} is wrong: expected text")
    return value


def two_of(value: object, where: str, name: str) -> Sequence[object]:
    """A cell that must be a list of two.

    Raises:
        ValueError: it is not; row and column are named.
    """
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{where}: {name} = {value!r} is wrong: expected a list of two")
    return value


def truth_of(value: object, where: str, name: str) -> bool:
    """A cell that must be true or false, or 1 or 0.

    Raises:
        ValueError: it is not; row and column are named.
    """
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise ValueError(f"{where}: {name} = {value!r} is wrong: expected true or false, 1 or 0")
    return bool(value)
