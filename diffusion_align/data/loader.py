"""Endless batches whose randomness belongs to the samples: resume, world size and threads change nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffusion_align.files import write_whole
from diffusion_align.pictures import upright_size

from .beyond_pairs.ranked import ListSize
from .draws import FixedDraws
from .pairs import PairDataset
from .transforms import PairTransform
from .types import CorruptImageError, Example, ListRecord, PairBatch, Record, collate

E_co = TypeVar("E_co", covariant=True)
E = TypeVar("E")
B = TypeVar("B")


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
        lists: how many pictures of a list are shown; None of all that is no list.
    """

    def __init__(
        self,
        dataset: PairDataset,
        transform: PairTransform,
        dropped: str | None = None,
        lists: ListSize | None = None,
    ) -> None:
        self.dataset, self.transform, self.dropped, self.lists = dataset, transform, dropped, lists

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int, seed: int, drop_caption: bool) -> Example:
        record = self.dataset[index]
        caption = self.dropped if drop_caption else record.caption
        return pixel_example(record, self.transform, seed, caption, self.lists)

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


def pixel_example(
    record: Record, transform: PairTransform, seed: int, caption: str | None, lists: ListSize | None = None
) -> Example:
    """Decode and augment one pair, picture or list."""
    target = None
    if lists is not None and isinstance(record, ListRecord):
        target = transform.target(upright_size(record.pictures[0], f"{record.key}: the number 0 image"))
        record = record.only(lists.places(len(record.pictures), seed))
    pixels, size_ids = transform(record.images(), seed, target)
    judged = record.judgement
    example = Example(
        caption, size_ids, record.preference, record.weight, record.key, pixels=pixels, label=judged.label
    )
    return example if lists is None else lists.filled(example, judged)


def sample_seed(seed: int, position: int) -> int:
    """The int64 seed of the sample at ``position`` of a run's endless sequence."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Corruption:
    """Counts unreadable images and stops the run when there are too many.

    Attributes:
        messages: what was found, by the name of the pair.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.messages: dict[str, str] = {}
        self._file: Path | None = None

    def keep(self, file: Path, resumed: bool) -> None:
        """List what is found in ``file``, JSON Lines; a resumed run goes on with what is listed there already."""
        self._file = file
        if not resumed:
            file.unlink(missing_ok=True)
        elif file.is_file():
            listed = (json.loads(line) for line in file.read_text().splitlines())
            self.messages |= {line["pair"]: line["error"] for line in listed}

    def note(self, key: str, error: CorruptImageError) -> None:
        """Raises ``ValueError`` listing what was found once more than ``limit`` pairs are corrupt."""
        if key not in self.messages:
            self.messages[key] = str(error)
            self._write()
        if len(self.messages) > self.limit:
            shown = "; ".join(list(self.messages.values())[:5])
            raise ValueError(f"more than max_corrupt = {self.limit} pairs cannot be decoded: {shown}")

    def note_all(self, found: Mapping[str, CorruptImageError]) -> None:
        """:func:`note` one after the other."""
        for key, error in found.items():
            self.note(key, error)

    def _write(self) -> None:
        if self._file is None:
            return
        lines = [json.dumps({"pair": key, "error": self.messages[key]}) for key in sorted(self.messages)]
        write_whole(self._file, "".join(line + "\n" for line in lines).encode())


class ExampleLoader(Generic[E, B]):
    """Shuffled batches of this process; an iterator that never ends.

    Batch k of all processes together holds positions k*B*W .. (k+1)*B*W - 1 of the run's sequence, B pairs for each of
    W processes in rank order, so that W processes see what one process with the batch B*W sees. A pair's crop, flip,
    caption dropout and training noise follow from (seed, position). A run that goes on with other batches goes on at
    its position (pairs of one size only).

    Args:
        batch_size: B, pairs per process.
        collate: examples and their seeds to a batch.
        caption_dropout: share of pairs whose caption is dropped.
        num_workers: threads that read ahead; 0 reads when asked.
        max_corrupt: unreadable pairs replaced by their successors before the run stops.
        together: number of neighbouring examples that are drawn one after the other (of one size only).
        order: which example stands at a position of the run's sequence, in place of shuffled epochs (of one size only).

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
        order: Callable[[int], int] | None = None,
    ) -> None:
        self.together, self.order = together, order
        self.examples, self.batch_size, self.collate, self.seed = examples, batch_size, collate, seed
        self.rank, self.world_size = rank, world_size
        self.caption_dropout, self.num_workers = caption_dropout, num_workers
        self.corruption = Corruption(max_corrupt)
        #: The position: batches read since position ``start`` of the sequence, where batches got this size.
        self.start, self.batches_read = 0, 0
        sizes = examples.sizes()
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        self.group_sizes = sorted(groups)
        self.groups = [np.array(groups[size]) for size in self.group_sizes]
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
            ahead: dict[int, Future[tuple[B, dict[str, CorruptImageError]]]] = {}
            while True:
                k = self.batches_read
                for j in range(k, k + self.num_workers + 1):
                    if j not in ahead:
                        ahead[j] = pool.submit(self._read, j)
                batch = self._counted(*ahead.pop(k).result())
                self.batches_read = k + 1
                yield batch

    def load(self, k: int) -> B:
        """Batch ``k`` of this process."""
        return self._counted(*self._read(k))

    def _counted(self, batch: B, corrupt: dict[str, CorruptImageError]) -> B:
        """Count what was unreadable when the batch is used: what was read ahead may never be."""
        self.corruption.note_all(corrupt)
        return batch

    def _read(self, k: int) -> tuple[B, dict[str, CorruptImageError]]:
        full = self.batch_size * self.world_size
        start = self.start + k * full + self.rank * self.batch_size
        positions = range(start, start + self.batch_size)
        indices = self._indices(k, full)[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        visits = [sample_seed(self.seed, position) for position in positions]
        corrupt: dict[str, CorruptImageError] = {}
        read = [self._example(int(i), visit, corrupt) for i, visit in zip(indices, visits, strict=True)]
        return self.collate([example for example, _ in read], [seed for _, seed in read]), corrupt

    def own_seed(self, index: int, visit: int) -> int:
        """Seed of example ``index`` at the visit whose seed is ``visit``."""
        return visit

    def _example(self, index: int, visit: int, corrupt: dict[str, CorruptImageError]) -> tuple[E, int]:
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
                corrupt[f"pair {candidate}"] = error
            if len(corrupt) > self.corruption.limit:
                break
        self.corruption.note_all(corrupt)
        raise ValueError(f"no pair of the data set can be decoded: {next(iter(corrupt.values()))}")

    def _indices(self, k: int, full: int) -> NDArray[np.intp]:
        """Pairs of the global batch ``k``."""
        if len(self.groups) == 1:
            count = len(self.groups[0])
            positions = self.start + np.arange(k * full, (k + 1) * full)
            if self.order is not None:
                return np.array([self.order(int(p)) for p in positions])
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
        return {"start": self.start, "batches_read": self.batches_read, "batch": self.batch_size * self.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a position.

        Raises:
            ValueError: it is a place in a stream, or one in other batches where pictures have several sizes.
        """
        if "batches_read" not in state:
            raise ValueError("the checkpoint's run streamed its pairs: set streaming to true")
        start, batches, full = int(state.get("start", 0)), int(state["batches_read"]), self.batch_size * self.world_size
        batch = int(state.get("batch", full))
        if batch != full and len(self.groups) > 1:
            raise ValueError(
                f"the checkpoint's batches have {batch} pairs, this run's {full}: with aspect_ratio_buckets the "
                "position in the data is one of whole batches; keep per_device_train_batch_size times processes"
            )
        self.start, self.batches_read = (start, batches) if batch == full else (start + batches * batch, 0)

    def never_used(self) -> dict[tuple[int, int], int]:
        """Examples of each size (h, w) of which there are too few for a batch of all processes."""
        full = self.batch_size * self.world_size
        sizes = zip(self.group_sizes, self.groups, strict=True)
        return {size: len(group) for size, group in sizes if len(self.groups) > 1 and len(group) < full}


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
