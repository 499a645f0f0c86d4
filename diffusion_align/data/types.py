"""What travels from files to the training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from diffusion_align.adapters.conditioning import Conditioning
from diffusion_align.devices import send
from diffusion_align.pictures import CorruptImageError, decoded_picture
from diffusion_align.showing import grid_html, shortened

__all__ = [
    "CorruptImageError", "Example", "Judgement", "ListRecord", "PairBatch", "PairRecord", "Record", "collate",
    "decoded_picture",
]  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """What is said of an example's pictures, where it is no pair.

    Attributes:
        label: of a labelled picture +1 (liked) or -1 (disliked).
        ranks: of a list one number for each picture: 0 is the best, equal ones are ties.
        scores: of a list one number for each picture, larger is better; None where there are ranks only.
    """

    label: float | None = None
    ranks: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None

    def only(self, places: Sequence[int]) -> Judgement:
        """Of the pictures at ``places`` of a list; ranks stay what they are."""
        ranks = None if self.ranks is None else tuple(self.ranks[place] for place in places)
        scores = None if self.scores is None else tuple(self.scores[place] for place in places)
        return Judgement(self.label, ranks, scores)

    def kept(self) -> dict[str, Any]:
        """What there is, as a cache keeps it; nothing of a pair. JSON-able."""
        lists = {"ranks": self.ranks, "scores": self.scores}
        found = {name: list(values) for name, values in lists.items() if values is not None}
        return found if self.label is None else {"label": self.label, **found}


#: Of pairs, whose order is their judgement, and of pictures that nobody judged.
UNJUDGED = Judgement()


class Record(Protocol):
    """One example as stored: a pair, a picture or a list."""

    @property
    def caption(self) -> str: ...
    @property
    def preference(self) -> float: ...
    @property
    def weight(self) -> float: ...
    @property
    def key(self) -> str: ...
    @property
    def judgement(self) -> Judgement: ...

    def contents(self) -> dict[str, bytes]:
        """The encoded images by what messages call them."""

    def images(self) -> tuple[Image.Image, ...]:
        """The images, RGB.

        Raises:
            CorruptImageError: one cannot be decoded.
        """

    def _repr_html_(self) -> str:
        """As a notebook shows it."""


@dataclass(frozen=True, repr=False)
class ListRecord:
    """K pictures of one prompt, as stored.

    Attributes:
        pictures: encoded images, in any order.
        judgement: their ranks, and scores if there are any.
        caption, weight, key: as those of ``PairRecord``.
        places: where the pictures stood before others were left out, from 0; None: all are there.
    """

    pictures: tuple[bytes, ...]
    judgement: Judgement
    caption: str
    weight: float = 1.0
    key: str = ""
    preference: float = 1.0
    places: tuple[int, ...] | None = None

    def contents(self) -> dict[str, bytes]:
        """The encoded images by what messages call them."""
        places = self.places or tuple(range(len(self.pictures)))
        return {f"number {place}": content for place, content in zip(places, self.pictures, strict=True)}

    def images(self) -> tuple[Image.Image, ...]:
        """All images, RGB.

        Raises:
            CorruptImageError: one cannot be decoded.
        """
        return _decoded(self.contents(), self.key)

    def pil(self) -> tuple[Image.Image, ...]:
        """The same as ``images``."""
        return self.images()

    def __repr__(self) -> str:
        ranks = list(self.judgement.ranks or ())
        return f"ListRecord({shortened(self.caption)}, {len(self.pictures)} pictures, ranks {ranks})"

    def _repr_html_(self) -> str:
        ranks = self.judgement.ranks or ("?",) * len(self.pictures)
        return f"<p>{escape(self.caption)}</p>" + grid_html(self.images(), [f"rank {rank}" for rank in ranks])

    def only(self, places: Sequence[int]) -> ListRecord:
        """The list without its other pictures; ranks stay what they are."""
        pictures = tuple(self.pictures[place] for place in places)
        return replace(self, pictures=pictures, judgement=self.judgement.only(places), places=tuple(places))


@dataclass(frozen=True, repr=False)
class PairRecord:
    """One preference pair, or one picture with a caption, as stored.

    Attributes:
        chosen, rejected: encoded images (JPEG, PNG, WebP bytes); rejected is None of a single picture.
        caption: the prompt both were made for.
        preference: P(chosen is preferred): 1, or 0.5 for a tie, or a soft label in [0, 1]; of a labelled picture
            P(the label is right).
        weight: factor of the pair's loss.
        key: names the pair in messages, e.g. "row 17".
        judgement: of a single picture its label, if it has one.
    """

    chosen: bytes
    rejected: bytes | None
    caption: str
    preference: float = 1.0
    weight: float = 1.0
    key: str = ""
    judgement: Judgement = UNJUDGED

    def contents(self) -> dict[str, bytes]:
        """The encoded images by what messages call them, chosen first."""
        return {"chosen": self.chosen} | ({} if self.rejected is None else {"rejected": self.rejected})

    def images(self) -> tuple[Image.Image, ...]:
        """Both images, RGB, or the single one.

        Raises:
            CorruptImageError: one cannot be decoded.
        """
        return _decoded(self.contents(), self.key)

    def pil(self) -> tuple[Image.Image, ...]:
        """The same as ``images``."""
        return self.images()

    def __repr__(self) -> str:
        kind = "a picture" if self.rejected is None else "a pair"
        return f"PairRecord({kind}: {shortened(self.caption)}, preference {self.preference:g})"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.caption)}</p>" + grid_html(self.images(), list(self.contents()))


def _decoded(contents: dict[str, bytes], key: str) -> tuple[Image.Image, ...]:
    return tuple(decoded_picture(content, f"{key}: the {side} image") for side, content in contents.items())


@dataclass(frozen=True, repr=False)
class PairBatch:
    """B examples of K pictures each, ready for a training step.

    Pairs have K = 2, chosen first. Single pictures have K = 1: those of supervised fine-tuning, or unpaired ones with
    a ``label`` (liked or not). Ranked lists have any K, in any order, with ``rank``, perhaps ``score``, and with a
    ``mask`` where some have fewer than K.

    Attributes:
        captions: where the caption was dropped, None for the pipeline's null prompt, or "".
        size_ids: SDXL's original h, w, crop top, left, target h, w, (K, B, 6) float32.
        preference: of pairs P(chosen is preferred), of unpaired pictures P(the label is right), (B,) float32; 1 for
            all others.
        weight: (B,) float32.
        seeds: (B,) int64; all randomness of an example follows from its seed.
        keys: names of the examples.
        pixels: (K, B, 3, H, W) float32 in [-1, 1], or None when cached.
        posterior: mean and standard deviation of the latents, each (K, B, C, h, w), or None.
        cond: prompt embeddings (B rows, no size ids) from a cache, or None.
        label: of unpaired pictures (B,) float32: +1 liked, -1 disliked; else None.
        rank: of lists (B, K) int64: 0 is the best, equal numbers are ties, numbers need not be dense. It tells a list
            from a pair, so that lists with scores have it, too (``objectives.list_stats.ranks_of``); else None.
        score: of lists or pairs (B, K) float32, larger is better; None where there are ranks only, or nothing.
        mask: of lists (B, K) bool: which of the K pictures there are; None: all of them. The others are filled up with
            whatever has the right shape, and count nowhere.
    """

    captions: list[str | None]
    size_ids: Tensor
    preference: Tensor
    weight: Tensor
    seeds: Tensor
    keys: list[str]
    pixels: Tensor | None = None
    posterior: tuple[Tensor, Tensor] | None = None
    cond: Conditioning | None = None
    label: Tensor | None = None
    rank: Tensor | None = None
    score: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def __repr__(self) -> str:
        held = "cached" if self.pixels is None else f"pixels {tuple(self.pixels.shape)}"
        return f"PairBatch({len(self)} examples of {len(self.size_ids)} pictures, {held})"

    def to(self, device: torch.device | str) -> PairBatch:
        """Move every tensor, without waiting for the device."""
        return replace(
            self,
            size_ids=send(self.size_ids, device),
            preference=send(self.preference, device),
            weight=send(self.weight, device),
            seeds=send(self.seeds, device),
            pixels=None if self.pixels is None else send(self.pixels, device),
            posterior=None
            if self.posterior is None
            else (send(self.posterior[0], device), send(self.posterior[1], device)),
            cond=None if self.cond is None else self.cond.map(lambda tensor: send(tensor, device)),
            label=None if self.label is None else send(self.label, device),
            rank=None if self.rank is None else send(self.rank, device),
            score=None if self.score is None else send(self.score, device),
            mask=None if self.mask is None else send(self.mask, device),
        )

    def as_lists(self) -> PairBatch:
        """The batch as ranked lists: pairs become lists of two with the verdict's ranks, and p and 1 - p as scores.

        Lists are what they were. Scores that pairs have already stay.

        Raises:
            ValueError: no pairs, and no ranks.
        """
        if self.rank is not None:
            return self
        if len(self.size_ids) != 2:
            raise ValueError(
                f"{self.keys[0]}: expected a pair or a ranked list, found {len(self.size_ids)} picture(s) without ranks"
            )
        p = torch.stack([self.preference, 1 - self.preference], dim=1)
        rank = (p < p.flip(1)).long()
        return replace(self, rank=rank, score=p if self.score is None else self.score)

    def as_pictures(self, seeds: Tensor) -> PairBatch:
        """The batch as unpaired pictures: B pairs become 2 B of them, chosen ones (+1) first, then rejected ones (-1).

        Call it before ``to``. Pictures with a label are what they were.

        Args:
            seeds: of the 2 B pictures, (2 B,) int64: each has noise of its own.

        Raises:
            ValueError: lists, or single pictures without a label.
        """
        if self.label is not None:
            return self
        count = len(self.size_ids)
        if count != 2:
            raise ValueError(
                f"{self.keys[0]}: expected pairs, or single pictures with a label, found {count} picture(s) without one"
            )
        return PairBatch(
            captions=self.captions * 2,
            size_ids=self.size_ids.flatten(0, 1)[None],
            preference=self.preference.repeat(2),
            weight=self.weight.repeat(2),
            seeds=seeds,
            keys=[f"{key}, {side}" for side in ("chosen", "rejected") for key in self.keys],
            pixels=None if self.pixels is None else self.pixels.flatten(0, 1)[None],
            posterior=None
            if self.posterior is None
            else (self.posterior[0].flatten(0, 1)[None], self.posterior[1].flatten(0, 1)[None]),
            cond=None if self.cond is None else self.cond.repeat(2),
            label=torch.tensor([1.0, -1.0]).repeat_interleave(len(self)),
        )

    def rows(self, keep: Sequence[int]) -> PairBatch:
        """Some examples of the batch, in the order of ``keep``, which counts from 0."""
        index = torch.tensor(keep)
        return replace(
            self,
            captions=[self.captions[i] for i in keep],
            keys=[self.keys[i] for i in keep],
            preference=self.preference[index],
            weight=self.weight[index],
            seeds=self.seeds[index],
            label=None if self.label is None else self.label[index],
            rank=None if self.rank is None else self.rank[index],
            score=None if self.score is None else self.score[index],
            mask=None if self.mask is None else self.mask[index],
            size_ids=self.size_ids[:, index],
            pixels=None if self.pixels is None else self.pixels[:, index],
            posterior=None if self.posterior is None else (self.posterior[0][:, index], self.posterior[1][:, index]),
            cond=None if self.cond is None else self.cond.map(lambda tensor: tensor[index]),
        )


@dataclass(frozen=True)
class Example:
    """One example of a batch to be: the fields of :class:`PairBatch` without the batch dimension."""

    caption: str | None
    size_ids: Tensor
    preference: float
    weight: float
    key: str
    pixels: Tensor | None = None
    posterior: tuple[Tensor, Tensor] | None = None
    cond: Conditioning | None = None
    label: float | None = None
    rank: Tensor | None = None
    score: Tensor | None = None
    mask: Tensor | None = None


def collate(examples: Sequence[Example], seeds: Sequence[int]) -> PairBatch:
    """Stack examples of one image size and one kind; lists of one K (shorter ones are filled up and masked before)."""
    first = examples[0]
    posterior = None
    if first.posterior is not None:
        parts = [[e.posterior[i] for e in examples if e.posterior is not None] for i in range(2)]
        posterior = (torch.stack(parts[0], dim=1), torch.stack(parts[1], dim=1))
    return PairBatch(
        captions=[e.caption for e in examples],
        size_ids=torch.stack([e.size_ids for e in examples], dim=1),
        preference=torch.tensor([e.preference for e in examples], dtype=torch.float32),
        weight=torch.tensor([e.weight for e in examples], dtype=torch.float32),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        keys=[e.key for e in examples],
        pixels=None
        if first.pixels is None
        else torch.stack([e.pixels for e in examples if e.pixels is not None], dim=1),
        posterior=posterior,
        cond=None if first.cond is None else Conditioning.cat([e.cond for e in examples if e.cond is not None]),
        label=None if first.label is None else torch.tensor([e.label for e in examples], dtype=torch.float32),
        rank=_stacked([e.rank for e in examples]),
        score=_stacked([e.score for e in examples]),
        mask=_stacked([e.mask for e in examples]),
    )


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """All of (K,) as (B, K); None where there is none."""
    return None if parts[0] is None else torch.stack([part for part in parts if part is not None])
