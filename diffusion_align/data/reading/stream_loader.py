"""Batches of streamed pairs: in a random order that is known ahead, read and decoded while the step runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_align.pictures import CorruptImageError

from ..beyond_pairs.ranked import ListSize
from ..loader import Corruption, pixel_example, sample_seed
from ..transforms import PairTransform
from ..types import Example, PairBatch, Record, collate
from .row_order import blocks, spread_order
from .streamed import StreamedPairs

#: Threads that read parts of files; they mostly wait for the disk or the hub.
READERS = 2
#: Pairs of a block in positions of version 0.1.
OLD_BLOCK = 256

Found = dict[int, Record | CorruptImageError]


@dataclass(frozen=True)
class Block:
    """Pairs that are shuffled together, of one process.

    Attributes:
        epoch, number: which block of which epoch.
        carried: rows from the block before, which did not divide by the number of processes; of all processes.
        rows: this process's rows in the order of their use.
        needs: what is to be read for them: parts, in the order in which they are needed first, and their rows.
    """

    epoch: int
    number: int
    carried: tuple[int, ...]
    rows: NDArray[np.int64]
    needs: list[tuple[int, NDArray[np.int64]]]


@dataclass(frozen=True)
class Slot:
    """One place of a batch: pair ``place`` of ``block``, whose part ``read`` brings; ``position`` in the run."""

    block: Block
    place: int
    read: Future[Found]
    position: int


def needs(pairs: StreamedPairs, rows: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """The parts that hold ``rows``, in the order in which they are needed first, each with its rows, ascending."""
    parts = pairs.part_of(rows)
    numbers, first, counts = np.unique(parts, return_index=True, return_counts=True)
    groups = np.split(rows[np.argsort(parts, kind="stable")], np.cumsum(counts)[:-1])
    return [(int(numbers[i]), np.sort(groups[i])) for i in np.argsort(first)]


class StreamLoader:
    """Shuffled batches of this process from streamed pairs; an iterator that never ends.

    An epoch takes the parts of all files in an order that is spread evenly over the data set, and cuts them into blocks
    of at least ``buffer`` rows. The pairs of a block are divided among the processes, by parts as far as possible, and
    each process shuffles its own. So the order is known before anything is read: parts are read in the order in which
    they are needed, while the rows that are held, encoded, are at most one block; and a position is a block and a place
    in it, from which a resumed run goes on without reading what came before. Pairs that do not divide by the number of
    processes go to the next block.

    An unreadable pair is replaced by the next one of its block that can be read. Crop, flip, caption dropout and
    training noise of a pair follow from (seed, position in the run), as in :class:`~..loader.ExampleLoader`.

    Positions of version 0.1 and its successor keep their number of pairs, and go on in this order.

    Args:
        buffer: pairs that are shuffled together.
        num_workers: threads that decode ahead; 0 decodes when asked.
        dropped, lists: as for :class:`~..loader.PixelExamples`.

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
        num_workers: int = 2,
        lists: ListSize | None = None,
    ) -> None:
        if transform.buckets is not None:
            raise ValueError("aspect_ratio_buckets need a data set with random access: set streaming to false")
        self.pairs, self.transform, self.batch_size = pairs, transform, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.caption_dropout, self.buffer, self.dropped = caption_dropout, buffer, dropped
        self.num_workers, self.lists = num_workers, lists
        self.corruption = Corruption(max_corrupt)
        self.position: dict[str, Any] = {"samples": 0, "epoch": 0, "block": 0, "used": 0, "carried": []}
        self.cut = lru_cache(maxsize=2)(self._cut)

    def __iter__(self) -> Iterator[PairBatch]:
        place = self.position
        planned = self._blocks(place["epoch"], place["block"], place["carried"])
        ahead = Ahead(self.pairs, planned, place["used"] // self.world_size)
        decoders = ThreadPoolExecutor(max(1, self.num_workers))
        waiting: deque[tuple[Future[tuple[PairBatch, dict[str, CorruptImageError]]], dict[str, Any]]] = deque()
        samples = place["samples"]
        try:
            while True:
                while len(waiting) <= self.num_workers:
                    slots = [ahead.slot(samples + self.rank * self.batch_size + i) for i in range(self.batch_size)]
                    samples += self.batch_size * self.world_size
                    waiting.append((decoders.submit(self._batch, slots), self._after(slots[-1], samples)))
                ahead.read_on(self.batch_size * (self.num_workers + 1))
                future, after = waiting.popleft()
                batch, corrupt = future.result()
                ahead.held -= self.batch_size
                self.corruption.note_all(corrupt)
                self.position = after
                yield batch
        finally:
            with suppress(AttributeError):  # at the end of the interpreter the pools' own modules are gone
                decoders.shutdown(wait=False, cancel_futures=True)
                ahead.close()

    def state_dict(self) -> dict[str, Any]:
        """The position; JSON-able."""
        return {**self.position, "data": self._facts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a position.

        Raises:
            ValueError: it belongs to other files or settings, or to a data set that was not streamed.
        """
        if "samples" in state:
            self._check(state["data"])
            self.position = {name: state[name] for name in self.position}
            return
        if "read" not in state:
            raise ValueError("the checkpoint's run did not stream its pairs: set streaming to false")
        used = state["used"] if "used" in state else OLD_BLOCK * state["block"] + state["offset"]
        samples, used = (int(count) * self.world_size for count in (state["read"], used))
        self.position = {"samples": samples, "epoch": int(state["epoch"]), "block": 0, "used": used, "carried": []}

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Numbers of the rows that this process gets in an epoch, in their order; of several processes, without what
        the epoch before left to be divided."""
        found = takewhile(lambda block: block.epoch == number, self._blocks(number, 0, []))
        return np.concatenate([block.rows for block in found])

    def _facts(self) -> dict[str, Any]:
        return {**self.pairs.facts(), "shuffle_buffer": self.buffer}

    def _check(self, saved: dict[str, Any]) -> None:
        own = self._facts()
        differing = [name for name in own if own[name] != saved.get(name)]
        if differing:
            then, now = (", ".join(f"{name} {facts.get(name)}" for name in differing) for facts in (saved, own))
            raise ValueError(
                f"{self.pairs.name}: the checkpoint's place was in other data: {then}; now {now}. Give back the data "
                "and settings that the run began with, or start again in another folder"
            )

    def _after(self, slot: Slot, samples: int) -> dict[str, Any]:
        block = slot.block
        used = (slot.place + 1) * self.world_size
        return {
            "samples": samples, "epoch": block.epoch, "block": block.number, "used": used, "carried": [*block.carried],
        }  # fmt: skip

    def _cut(self, epoch: int) -> list[NDArray[np.int64]]:
        """The blocks of an epoch as numbers of parts."""
        selected = self.pairs.selected
        order = spread_order(len(selected), np.random.default_rng([self.seed, epoch, 4]))
        return blocks(selected[order], self.pairs.sizes, self.buffer)

    def _blocks(self, epoch: int, start: int, carried: list[int]) -> Iterator[Block]:
        """This process's blocks from block ``start`` of an epoch on, without end."""
        while True:
            cut, found = self.cut(epoch), 0
            for number in range(start, len(cut)):
                rows = np.concatenate([np.array(carried, dtype=np.int64), self.pairs.rows_of(cut[number].tolist())])
                share = len(rows) // self.world_size
                own = rows[self.rank * share : (self.rank + 1) * share]
                own = np.random.default_rng([self.seed, epoch, number, self.rank]).permutation(own)
                yield Block(epoch, number, tuple(carried), own, needs(self.pairs, own))
                carried = rows[share * self.world_size :].tolist()
                found += len(rows)
            if not start and not found:
                raise ValueError(f"{self.pairs.name}: the stream holds no pair to use")
            epoch, start = epoch + 1, 0

    def _batch(self, slots: list[Slot]) -> tuple[PairBatch, dict[str, CorruptImageError]]:
        corrupt: dict[str, CorruptImageError] = {}
        seeds = [sample_seed(self.seed, slot.position) for slot in slots]
        examples = [self._example(slot, seed, corrupt) for slot, seed in zip(slots, seeds, strict=True)]
        return collate(examples, seeds), corrupt

    def _example(self, slot: Slot, seed: int, corrupt: dict[str, CorruptImageError]) -> Example:
        """The pair of a slot, or the next of its block that can be decoded."""
        rows = slot.block.rows
        drop = np.random.default_rng([seed % 2**64, 1]).random() < self.caption_dropout
        for offset in range(len(rows)):
            row = int(rows[(slot.place + offset) % len(rows)])
            # What stands in is read once more: its own turn may be over, or still to come.
            found = slot.read.result().pop(row) if not offset else self._read_again(row)
            try:
                if isinstance(found, CorruptImageError):
                    raise found
                caption = self.dropped if drop else found.caption
                return pixel_example(found, self.transform, seed, caption, self.lists)
            except CorruptImageError as error:
                corrupt[f"row {row}"] = error
            if len(corrupt) > self.corruption.limit:
                break
        self.corruption.note_all(corrupt)
        raise ValueError(
            f"{self.pairs.name}: {len(corrupt)} pairs one after the other cannot be decoded: "
            f"{next(iter(corrupt.values()))}"
        )

    def _read_again(self, row: int) -> Record | CorruptImageError:
        rows = np.array([row], dtype=np.int64)
        return self.pairs.read(int(self.pairs.part_of(rows)[0]), rows)[row]


class Ahead:
    """Plans blocks and reads their parts before they are needed, in threads; used from one thread.

    Args:
        pairs: where parts are read.
        planned: the blocks; the next one is made while the present one is used.
        used: pairs of them that are passed over.

    Attributes:
        held: rows that were asked for and not used yet; whoever uses some takes them off.
    """

    def __init__(self, pairs: StreamedPairs, planned: Iterator[Block], used: int) -> None:
        self.pairs, self.planned, self.place = pairs, planned, used
        self.held = 0
        self.planner, self.readers = ThreadPoolExecutor(1), ThreadPoolExecutor(READERS)
        self.coming = self.planner.submit(next, planned)
        self.blocks: deque[tuple[int, Block]] = deque()
        self.count = 0
        self.to_read: deque[tuple[tuple[int, int], NDArray[np.int64]]] = deque()
        self.reads: dict[tuple[int, int], tuple[Future[Found], set[int]]] = {}

    def slot(self, position: int) -> Slot:
        """The next pair, for place ``position`` of the run; waits where the next block is not planned yet."""
        while not self.blocks or self.place >= len(self.blocks[0][1].rows):
            if self.blocks:
                self.place -= len(self.blocks.popleft()[1].rows)
            if not self.blocks:
                self._plan()
        number, block = self.blocks[0]
        row = int(block.rows[self.place])
        key = number, int(self.pairs.part_of(block.rows[self.place : self.place + 1])[0])
        while key not in self.reads:
            self._read_next()
        read, left = self.reads[key]
        left.discard(row)
        if not left:
            del self.reads[key]
        self.place += 1
        return Slot(block, self.place - 1, read, position)

    def read_on(self, spare: int) -> None:
        """Ask for what is needed next, up to as many rows as the present block has, and ``spare`` more."""
        while True:
            if not self.to_read:
                if len(self.blocks) > 1 or not self.coming.done():
                    return
                self._plan()
                continue
            if self.held + len(self.to_read[0][1]) > len(self.blocks[0][1].rows) + spare:
                return
            self._read_next()

    def close(self) -> None:
        for pool in (self.readers, self.planner):
            pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self) -> None:
        block: Block = self.coming.result()
        self.coming = self.planner.submit(next, self.planned)
        first = self.place if not self.blocks else 0
        wanted = needs(self.pairs, block.rows[first:]) if first else block.needs
        self.to_read.extend(((self.count, part), rows) for part, rows in wanted)
        self.blocks.append((self.count, block))
        self.count += 1

    def _read_next(self) -> None:
        key, rows = self.to_read.popleft()
        self.reads[key] = self.readers.submit(self.pairs.read, key[1], rows), set(rows.tolist())
        self.held += len(rows)
