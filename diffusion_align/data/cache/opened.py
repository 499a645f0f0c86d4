"""A finished cache as a source of examples."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from diffusion_align.adapters import Conditioning
from diffusion_align.files import sha256_of

from ..beyond_pairs.balance import Summary, labelled_summary, list_summary
from ..beyond_pairs.ranked import sized_lists
from ..transforms import PairTransform
from ..types import Example, Judgement
from .shard_files import CacheError, read_manifest, shard_problem


class CachedPairs:
    """A finished cache as a source of examples, in place of images and encoders.

    Raises:
        CacheError: no finished cache is there, it was made with another model or transform (``expected``), or a shard
            is torn. Shards' checksums are verified when they are first read.

    Args:
        dropped: what stands in the place of a dropped caption; None is the pipeline's null prompt.
        pictures: how many images an example has: both of a pair, or 1, the chosen one. A cache of single pictures has
            no pairs; single pictures are also read from one of pairs. Lists and labelled pictures are what they are.
        list_size: pictures that are shown of a longer list; None shows all.

    Attributes:
        counts: pairs that were to be encoded, and those that could not be read.
        data: what the cache says of the data set it was made of; None of a cache of an earlier version.
        corrupt_rows: numbers of the rows that could not be read.
        contents: hash of all that examples are made of: model, transform, pairs and, by their shards, every value.
    """

    def __init__(
        self,
        folder: str | Path,
        expected: str | None = None,
        dropped: str | None = None,
        pictures: int = 2,
        list_size: int | None = None,
    ) -> None:
        self.folder, self.dropped = Path(folder), dropped
        record = read_manifest(self.folder)
        if expected is not None and record["fingerprint"] != expected:
            raise CacheError(
                f"cache {self.folder} was made with another model or other resolution, flip, interpolation or bucket "
                "settings: build it again in another folder"
            )
        self.pairs: list[dict[str, Any]] = record["pairs"]
        #: What the examples are called.
        self.unit = str(record.get("unit", "pairs" if pictures == 2 else "pictures"))
        self.lists, self.pictures = None, {"labelled pictures": 1}.get(self.unit, pictures)
        if self.unit == "ranked lists":
            lengths = Counter(len(pair["images"]) for pair in self.pairs)
            self.lists, self.pictures = sized_lists(lengths, list_size, str(self.folder)), max(lengths, default=2)
        elif any(len(pair["images"]) < self.pictures for pair in self.pairs):
            raise CacheError(f"cache {self.folder} holds single pictures (of train sft), no pairs: give another folder")
        self.captions: list[str | None] = record["captions"]
        self.transform = PairTransform(**record["transform"] | {"buckets": _tuples(record["transform"]["buckets"])})
        self._rows = {caption: i for i, caption in enumerate(self.captions)}
        if None not in self._rows:  # a cache of version 0.1, where "" is the null prompt
            if dropped is not None:
                raise CacheError(
                    f"cache {self.folder} has no embedding of the empty prompt, which null_prompt encoded asks for: "
                    "build it again in another folder"
                )
            self._rows[None] = self._rows[""]
        self._shard_size, self._image_shards, self._shards = (
            record[name] for name in ("shard_size", "image_shards", "shards")
        )
        count = -(-len(self.captions) // self._shard_size)
        self._prompt_shards = record.get("prompt_shards") or [f"prompts-{i:05d}.safetensors" for i in range(count)]
        self.data: dict[str, Any] | None = record.get("data")
        corrupt = record.get("corrupt", [])
        self.corrupt_rows = frozenset(record.get("corrupt_rows", ()))
        self.name, self.used = str(self.folder), len(self.pairs)
        self.counts = {"rows": self.used + len(corrupt), "unreadable": len(corrupt)}
        self.uncaptioned: list[str] = []
        self.caption_sample = [caption for caption in self.captions if caption]
        held = [record["fingerprint"], self.pairs, self.captions, self._shards]
        self.contents = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
        for name, facts in self._shards.items():
            problem = shard_problem(self.folder / name, facts)
            if problem is not None:
                raise CacheError(f"{problem}: run 'diffusion-align cache' again to rebuild it")
        self._open: dict[str, Any] = {}

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(int(facts["bytes"]) for facts in self._shards.values())

    def __len__(self) -> int:
        return len(self.pairs)

    def key(self, index: int) -> str:
        return str(self.pairs[index]["key"])

    def sizes(self) -> list[tuple[int, int]]:
        return [(pair["target"][0], pair["target"][1]) for pair in self.pairs]

    def example(self, index: int, seed: int, drop_caption: bool) -> Example:
        """Pair ``index`` with posterior (mean, std each (2, C, h, w) float16) and prompt embeddings."""
        pair = self.pairs[index]
        flip = self.transform.draw(seed)[2]
        shown = list(range(len(pair["images"])))[: self.pictures]
        if self.lists is not None:
            shown = self.lists.places(len(shown), seed)
        parts = [self._image(pair["images"][place], flip) for place in shown]
        posterior = (torch.stack([mean for mean, _ in parts]), torch.stack([std for _, std in parts]))
        sizes = pair["size_ids_flipped" if flip else "size_ids"]
        size_ids = torch.tensor([sizes[place] for place in shown], dtype=torch.float32)
        caption = self.dropped if drop_caption else pair["caption"]
        example = Example(
            caption,
            size_ids,
            pair["preference"],
            pair["weight"],
            pair["key"],
            posterior=posterior,
            cond=self._prompt(self._rows[caption]),
            label=pair.get("label"),
        )
        if self.lists is None:
            return example
        return self.lists.filled(example, Judgement(ranks=pair["ranks"], scores=pair.get("scores")).only(shown))

    def summary(self) -> Summary:
        """What is worth knowing beside what is left out."""
        if self.unit == "labelled pictures":
            captions, labels = ([pair[name] for pair in self.pairs] for name in ("caption", "label"))
            return labelled_summary(captions, labels, [pair["images"][0] for pair in self.pairs])
        if self.unit == "ranked lists":
            return list_summary(Counter(len(pair["images"]) for pair in self.pairs))
        return Summary()

    def _image(self, name: str, flip: bool) -> tuple[Tensor, Tensor]:
        shard = self._shard(self._image_shards[name])
        both = shard.get_tensor(f"{name}.flipped" if flip else name)
        return both[0], both[1]

    def _prompt(self, row: int) -> Conditioning:
        shard = self._shard(self._prompt_shards[row // self._shard_size])
        pooled = shard.get_tensor(f"{row}.pooled")[None] if f"{row}.pooled" in shard.keys() else None  # noqa: SIM118
        return Conditioning(shard.get_tensor(f"{row}.embeds")[None], pooled)

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            if sha256_of(path) != self._shards[name]["sha256"]:
                raise CacheError(f"{path} does not match its checksum: run 'diffusion-align cache' again to rebuild it")
            self._open[name] = safe_open(str(path), framework="pt")
        return self._open[name]


def _tuples(buckets: list[list[int]] | None) -> tuple[tuple[int, int], ...] | None:
    return None if buckets is None else tuple((height, width) for height, width in buckets)
