"""From pictures and captions to what a shard holds of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.adapters.prompts import CHUNK, encode_in_chunks

from ..transforms import PairTransform
from ..types import CorruptImageError, decoded_picture
from .identity import Cacheable, image_name
from .index import Index

T = TypeVar("T")
R = TypeVar("R")

#: Pictures that are decoded ahead, for each thread.
AHEAD = 4


@dataclass(frozen=True)
class Encoded:
    """An encoded picture of a pair that is to be decoded.

    Attributes:
        name: what the cache calls it.
        where: what messages call it.
    """

    name: str
    content: bytes
    where: str
    target: tuple[int, int]


def encode_images(
    adapter: Adapter,
    pairs: Cacheable,
    transform: PairTransform,
    index: Index,
    names: list[str],
    batch_size: int,
    workers: int,
    done: Callable[[int], None],
    earlier: Callable[[str, list[str]], dict[str, Tensor] | None],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Mean and deviation (2, C, h, w) float16 of each picture of ``names``, and mirrored under NAME.flipped; and
    messages of those that cannot be decoded, by name.

    Args:
        done: is told how many pictures were encoded.
        earlier: what an earlier shard has of a picture.
    """
    flips = (False, True) if transform.random_flip else (False,)
    tensors: dict[str, Tensor] = {}
    corrupt: dict[str, str] = {}
    wanted = []
    for name in names:
        held = earlier(name, [_variant(name, flip) for flip in flips])
        if held is None:
            wanted.append(name)
        else:
            tensors |= held
    waiting: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}

    def encode(group: list[tuple[str, Tensor]]) -> None:
        mean, std = adapter.encode_posterior(torch.stack([pixels for _, pixels in group]))
        for i, (name, _) in enumerate(group):
            tensors[name] = torch.stack([mean[i], std[i]]).half().cpu()
        done(sum(not name.endswith(".flipped") for name, _ in group))

    def decode(picture: Encoded) -> tuple[Encoded, list[Tensor] | str]:
        try:
            image = decoded_picture(picture.content, picture.where)
        except CorruptImageError as error:
            return picture, str(error)
        return picture, [transform.crop(image, picture.target, 0.5, 0.5, flip)[0] for flip in flips]

    for picture, found in _in_threads(decode, _contents(pairs, index, wanted), workers):
        if isinstance(found, str):
            corrupt[picture.name] = found
            done(1)
            continue
        group = waiting.setdefault(picture.target, [])
        group += [(_variant(picture.name, flip), pixels) for flip, pixels in zip(flips, found, strict=True)]
        while len(group) >= batch_size:
            encode(group[:batch_size])
            del group[:batch_size]
    for group in waiting.values():
        if group:
            encode(group)
    return {key: tensors[key] for name in names for key in (name, _variant(name, True)) if key in tensors}, corrupt


def encode_prompts(adapter: Adapter, captions: list[str | None], first: int) -> dict[str, Tensor]:
    """Embeddings of captions, float16, by their number, of which the first is ``first``."""
    tensors: dict[str, Tensor] = {}
    for start in range(0, len(captions), CHUNK):
        cond = encode_in_chunks(adapter, captions[start : start + CHUNK])
        for i in range(len(cond)):
            tensors[f"{first + start + i}.embeds"] = cond.embeds[i].half().cpu()
            if cond.pooled is not None:
                tensors[f"{first + start + i}.pooled"] = cond.pooled[i].half().cpu()
    return tensors


def image_bytes_of(adapter: Adapter, transform: PairTransform, target: tuple[int, int]) -> int:
    """Bytes of one picture: mean and deviation in float16, once or with its mirror image."""
    factor = adapter.vae_scale_factor
    values = adapter.vae.config.latent_channels * (target[0] // factor) * (target[1] // factor)
    return int(values * 2 * 2 * (2 if transform.random_flip else 1))


def prompt_bytes_of(adapter: Adapter) -> int:
    """Bytes of one caption."""
    return sum(tensor.numel() * tensor.element_size() for tensor in encode_prompts(adapter, [""], 0).values())


def _variant(name: str, flip: bool) -> str:
    return f"{name}.flipped" if flip else name


def _contents(pairs: Cacheable, index: Index, names: list[str]) -> Iterator[Encoded]:
    """The encoded pictures, read by rows in their order."""
    of_rows: dict[int, list[tuple[int, str]]] = {}
    for name in names:
        row, side, _ = index.images[name]
        of_rows.setdefault(row, []).append((side, name))
    for row, record in pairs.records(np.array(sorted(of_rows), dtype=np.int64)):
        if isinstance(record, CorruptImageError):  # it was read for the index
            raise record
        sides = list(record.contents().items())
        for side, name in of_rows[row]:
            called, content = sides[side]
            target = index.images[name][2]
            if image_name(content, target) != name:
                raise RuntimeError(f"{pairs.where(row)}: the {called} image changed while it was encoded: start again")
            yield Encoded(name, content, f"{record.key}: the {called} image", target)


def _in_threads(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``work`` of every item, in order, a few of them ahead."""
    if workers < 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
