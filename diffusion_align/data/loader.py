"""Endless batches whose randomness belongs to the samples: resume, world size and threads change nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .draws import FixedDraws
from .pairs import PairDataset, StreamedPairs
from .transforms import PairTransform
from .types import CorruptImageError, Example, PairBatch, PairRecord, collate

E_co = TypeVar("E_co", covariant=True)
E = TypeVar("E")
B = TypeVar("B")


#: Pairs of a block in positions of version 0.1.
OLD_BLOCK = 256


class Examples(Protocol[E_co]):
    """Pairs ready to be batched: decoded images, or cached latents."""

    def __len__(self) -> int: ...
    def example(self, index: int, seed: int, drop_caption: bool) -> E_co:
        """Pair ``index``, augmented as ``seed`` says."""

    def sizes(self) -> list[tuple[int, int]]:
        """Target (h, w) of every pair; batches hold one size."""


class KeyedExamples(Examples[Example], Protocol):
    """Examples that can be named without being read."""

    def key(self, index: int) -> str:
        """What messages and fixed draws call pair ``index``."""


class PixelExamples:
    """Pairs decoded from their files.

    Args:
        dropped: what stands in the place of a dropped caption; None is the pipeline's null prompt.
    """

    def __init__(self, dataset: PairDataset, transform: PairTransform, dropped: str | None = None) -> None:
        self.dataset, self.transform, self.dropped = dataset, transform, dropped

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int, seed: int, drop_caption: bool) -> Example:
        record = self.dataset[index]
        return pixel_example(record, self.transform, seed, self.dropped if drop_caption else record.caption)

    def key(self, index: int) -> str:
        return self.dataset.key(index)

    def sizes(self) -> list[tuple[int, int]]:
        if self.transform.buckets is None:
            return [(self.transform.resolution,) * 2] * len(self)
        sizes = []
        for index in range(len(self)):
            try:
                sizes.append(self.transform.target(self.dataset[index].images()[0].size))
            except CorruptImageError:  # the loader replaces and counts it when its turn comes
                sizes.append(self.transform.buckets[0])
        return sizes


def pixel_example(record: PairRecord, transform: PairTransform, seed: int, caption: str | None) -> Example:
    """Decode and augment one pair."""
    pixels, size_ids = transform(record.images(), seed)
    return Example(caption, size_ids, record.preference, record.weight, record.key, pixels=pixels)


def sample_seed(seed: int, position: int) -> int:
    """The int64 seed of the sample at ``position`` of a run's endless sequence."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Corruption:
    """Counts unreadable images and stops the run when there are too many."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.messages: dict[str, str] = {}

    def note(self, key: str, error: CorruptImageError) -> None:
        """Raises ``ValueError`` listing what was found once more than ``limit`` pairs are corrupt."""
        self.messages[key] = str(error)
        if len(self.messages) > self.limit:
            shown = "; ".join(list(self.messages.values())[:5])
            raise ValueError(f"more than max_corrupt = {self.limit} pairs cannot be decoded: {shown}")


class ExampleLoader(Generic[E, B]):
    """Shuffled batches of this process; an iterator that never ends.

    Batch k of all processes together holds positions k*B*W .. (k+1)*B*W - 1 of the run's sequence, B pairs for each of
    W processes in rank order, so that W processes see what one process with the batch B*W sees. A pair's crop, flip,
    caption dropout and training noise follow from (seed, position).

    Args:
        batch_size: B, pairs per process.
        collate: examples and their seeds to a batch.
        caption_dropout: share of pairs whose caption is dropped.
        num_workers: threads that read ahead; 0 reads when asked.
        max_corrupt: unreadable pairs replaced by their successors before the run stops.
        together: number of neighbouring examples that are drawn one after the other (of one size only).

    Raises:
        ValueError: no size has enough pairs for one batch.
    """

    def __init__(
        self,
        examples: Examples[E],
        batch_size: int,
        collate: Callable[[Sequence[E], Sequence[int]], B],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        caption_dropout: float = 0.0,
        num_workers: int = 0,
        max_corrupt: int = 100,
        together: int = 1,
    ) -> None:
        self.together = together
        self.examples, self.batch_size, self.collate, self.seed = examples, batch_size, collate, seed
        self.rank, self.world_size = rank, world_size
        self.caption_dropout, self.num_workers = caption_dropout, num_workers
        self.corruption = Corruption(max_corrupt)
        self.batches_read = 0
        sizes = examples.sizes()
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        self.groups = [np.array(groups[size]) for size in sorted(groups)]
        full = batch_size * world_size
        if len(self.groups) > 1 and not any(len(group) >= full for group in self.groups):
            largest = max(len(group) for group in self.groups)
            raise ValueError(
                f"no aspect-ratio bucket has enough pairs for a batch of {full}: the largest has {largest}"
            )
        self.permutation = lru_cache(maxsize=4)(self._permutation)

    def __iter__(self) -> Iterator[B]:
        if not self.num_workers:
            while True:
                batch = self.load(self.batches_read)
                self.batches_read += 1
                yield batch
        with ThreadPoolExecutor(self.num_workers) as pool:
            ahead: dict[int, Future[B]] = {}
            while True:
                k = self.batches_read
                for j in range(k, k + self.num_workers + 1):
                    if j not in ahead:
                        ahead[j] = pool.submit(self.load, j)
                batch = ahead.pop(k).result()
                self.batches_read = k + 1
                yield batch

    def load(self, k: int) -> B:
        """Batch ``k`` of this process."""
        full = self.batch_size * self.world_size
        start = k * full + self.rank * self.batch_size
        positions = range(start, start + self.batch_size)
        indices = self._indices(k, full)[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        visits = [sample_seed(self.seed, position) for position in positions]
        read = [self._example(int(i), visit) for i, visit in zip(indices, visits, strict=True)]
        return self.collate([example for example, _ in read], [seed for _, seed in read])

    def own_seed(self, index: int, visit: int) -> int:
        """Seed of example ``index`` at the visit whose seed is ``visit``."""
        return visit

    def _example(self, index: int, visit: int) -> tuple[E, int]:
        """Example ``index``, or the next that can be decoded, and its seed."""
        group = next(g for g in self.groups if len(self.groups) == 1 or index in g)
        start = int(np.searchsorted(group, index))
        for offset in range(len(group)):
            candidate = int(group[(start + offset) % len(group)])
            seed = self.own_seed(candidate, visit)
            drop = np.random.default_rng([seed % 2**64, 1]).random() < self.caption_dropout
            try:
                return self.examples.example(candidate, seed, bool(drop)), seed
            except CorruptImageError as error:
                self.corruption.note(f"pair {candidate}", error)
        raise ValueError("no pair of the data set can be decoded: " + next(iter(self.corruption.messages.values())))

    def _indices(self, k: int, full: int) -> NDArray[np.intp]:
        """Pairs of the global batch ``k``."""
        if len(self.groups) == 1:
            count = len(self.groups[0])
            positions = np.arange(k * full, (k + 1) * full)
            rows = [self.permutation(int(p // count))[p % count] for p in positions]
            return self.groups[0][rows]
        per_epoch = sum(len(group) // full for group in self.groups)
        epoch, batch = divmod(k, per_epoch)
        rng = np.random.default_rng([self.seed, epoch, 2])
        batches = [
            rng.permutation(group)[: len(group) // full * full].reshape(-1, full)
            for group in self.groups
            if len(group) >= full
        ]
        return np.concatenate(batches)[rng.permutation(per_epoch)[batch]]

    def _permutation(self, epoch: int) -> NDArray[np.intp]:
        count, rng = len(self.groups[0]), np.random.default_rng([self.seed, epoch])
        if self.together == 1:
            return rng.permutation(count)
        runs = np.split(np.arange(count), range(self.together, count, self.together))
        return np.concatenate([runs[i] for i in rng.permutation(len(runs))])

    def state_dict(self) -> dict[str, Any]:
        """The position; JSON-able."""
        return {"batches_read": self.batches_read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches_read = int(state["batches_read"])


class PairLoader(ExampleLoader[Example, PairBatch]):
    """The loader of preference pairs for diffusion models.

    Args:
        draws: the few seeds that each pair's visits choose from; None: a fresh one at every visit.
    """

    def __init__(
        self, examples: KeyedExamples, batch_size: int, *, draws: FixedDraws | None = None, **options: Any
    ) -> None:
        super().__init__(examples, batch_size, collate, **options)
        self.draws, self.key = draws, examples.key

    def own_seed(self, index: int, visit: int) -> int:
        return visit if self.draws is None else self.draws.of_visit(self.key(index), visit)


class StreamLoader:
    """Batches from a stream, shuffled through a buffer; an iterator that never ends.

    The files of the stream come in random order. ``buffer`` pairs are held, encoded; each that is used is drawn from
    them at random, and the next of the stream takes its place. The position (epoch, pairs used) is exact; resuming
    reads the epoch forward to it. A position of version 0.1, which shuffled within blocks, keeps its number of pairs.

    Args:
        buffer: pairs held; the first batch waits for them.
        dropped: as for :class:`PixelExamples`.

    Raises:
        ValueError: aspect-ratio buckets are asked for, which need random access.
    """

    def __init__(
        self,
        pairs: StreamedPairs,
        transform: PairTransform,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        caption_dropout: float = 0.0,
        max_corrupt: int = 100,
        buffer: int = 10_000,
        dropped: str | None = None,
    ) -> None:
        if transform.buckets is not None:
            raise ValueError("aspect_ratio_buckets need a data set with random access: set streaming to false")
        self.pairs = pairs.in_random_files(seed).shard(rank, world_size)
        self.transform, self.batch_size = transform, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.caption_dropout, self.buffer, self.dropped = caption_dropout, buffer, dropped
        self.corruption = Corruption(max_corrupt)
        self.position = {"epoch": 0, "used": 0, "read": 0}

    def __iter__(self) -> Iterator[PairBatch]:
        examples: list[Example] = []
        seeds: list[int] = []
        for record, after in self._records():
            seed = sample_seed(self.seed, self.position["read"] * self.world_size + self.rank)
            drop = np.random.default_rng([seed % 2**64, 1]).random() < self.caption_dropout
            try:
                caption = self.dropped if drop else record.caption
                examples.append(pixel_example(record, self.transform, seed, caption))
            except CorruptImageError as error:
                self.corruption.note(record.key, error)
                self.position |= {"read": self.position["read"] + 1}
                continue
            seeds.append(seed)
            self.position |= {"read": self.position["read"] + 1}
            if len(examples) == self.batch_size:
                self.position |= after
                yield collate(examples, seeds)
                examples, seeds = [], []

    def _records(self) -> Iterator[tuple[PairRecord, dict[str, int]]]:
        """Records from the saved position on, each with the position that follows it."""
        epoch, skip = self.position["epoch"], self.position["used"]
        while True:
            used = 0
            for used, record in enumerate(self._shuffled(epoch), start=1):
                if used > skip:
                    yield record, {"epoch": epoch, "used": used}
            if not used:
                raise ValueError(f"{self.pairs.source.name}: the stream holds no pair to use for process {self.rank}")
            epoch, skip = epoch + 1, 0

    def _shuffled(self, epoch: int) -> Iterator[PairRecord]:
        rng = np.random.default_rng([self.seed, epoch, self.rank])
        held: list[PairRecord] = []
        for record in self.pairs.epoch(epoch):
            if len(held) < self.buffer:
                held.append(record)
                continue
            place = int(rng.integers(self.buffer))
            yield held[place]
            held[place] = record
        for place in rng.permutation(len(held)):
            yield held[place]

    def state_dict(self) -> dict[str, Any]:
        """The position; JSON-able."""
        return dict(self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        used = state["used"] if "used" in state else OLD_BLOCK * state["block"] + state["offset"]
        self.position = {"epoch": int(state["epoch"]), "used": int(used), "read": int(state["read"])}
