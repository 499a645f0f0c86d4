"""Latents and prompt embeddings, encoded once: sharded safetensors, keyed by content and model, verified on read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.adapters.prompts import CHUNK, encode_in_chunks
from diffusion_align.files import check_writable, read_object, save_tensors, sha256_of, with_checksum, write_whole

from .pairs import PairDataset
from .transforms import PairTransform
from .types import CorruptImageError, Example

MANIFEST = "manifest.json"


class CacheError(RuntimeError):
    """A cache that cannot be used; the message names the file and how to get a good one."""


def fingerprint(adapter: Adapter, transform: PairTransform) -> str:
    """Hash of everything cached values depend on besides the pairs: encoders' weights and the transform."""
    facts = [transform.settings(), adapter.vae.config.scaling_factor]
    if adapter.vae.use_tiling:  # tiles' latents are others; without them the hash is that of caches from before tiling
        facts.append("tiling")
    if adapter.vae.config.get("latents_mean") is not None:
        facts += [list(adapter.vae.config.latents_mean), list(adapter.vae.config.latents_std)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for module in (adapter.vae, *adapter.text_encoders):
        hash_weights(digest, module.state_dict())
    return digest.hexdigest()


def hash_weights(digest: Any, state: Mapping[str, Tensor]) -> None:
    """Add names and values of ``state`` to a digest of ``hashlib``."""
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def build_cache(
    adapter: Adapter,
    dataset: PairDataset,
    transform: PairTransform,
    folder: str | Path,
    *,
    batch_size: int = 8,
    shard_size: int = 512,
    max_corrupt: int = 100,
    progress: Callable[[str], None] = lambda text: None,
    dropped: str | None = None,
) -> CachedPairs:
    """Encode every distinct image and caption of ``dataset``; whole shards of an earlier, interrupted build are kept.

    Images get one crop (the centre) and, with ``random_flip``, are encoded a second time mirrored; the VAE's mean and
    deviation are kept, so that training still samples them. Values are float16.

    Args:
        dropped: as for :class:`CachedPairs`.

    Raises:
        ValueError: ``random_crop``, or more than ``max_corrupt`` pairs with unreadable images.
    """
    if transform.random_crop:
        raise ValueError("random_crop cannot be cached: cached latents hold one crop per image")
    folder = Path(folder)
    check_writable(folder)
    mark = fingerprint(adapter, transform)
    pairs, images, corrupt = _index(dataset, transform)
    if len(corrupt) > max_corrupt:
        raise ValueError(f"more than max_corrupt = {max_corrupt} pairs cannot be decoded: {'; '.join(corrupt[:5])}")
    captions: list[str | None] = list(dict.fromkeys([None, "", *(pair["caption"] for pair in pairs)]))
    shards = _kept_shards(folder, mark)

    def ensure(name: str, make: Callable[[], dict[str, Tensor]], keys: str) -> None:
        if shards.get(name, {}).get("keys") != keys or not _is_whole(folder / name, shards[name]):
            progress(f"encoding {name}")
            shards[name] = {**_write_shard(folder / name, make()), "keys": keys}
            _write_json(folder / "shards.json", {"fingerprint": mark, "shards": shards})

    hashes = list(images)
    for number, start in enumerate(range(0, len(hashes), shard_size)):
        chunk = hashes[start : start + shard_size]
        keys = hashlib.sha256("".join(chunk).encode()).hexdigest()
        ensure(
            f"images-{number:05d}.safetensors",
            partial(_encode_images, adapter, dataset, transform, images, chunk, batch_size),
            keys,
        )
    for number, start in enumerate(range(0, len(captions), shard_size)):
        part = captions[start : start + shard_size]
        keys = hashlib.sha256(json.dumps(part).encode()).hexdigest()
        ensure(
            f"prompts-{number:05d}.safetensors",
            partial(_encode_prompts, adapter, part, start),
            keys,
        )
    where = {name: f"images-{i // shard_size:05d}.safetensors" for i, name in enumerate(hashes)}
    record = {
        "fingerprint": mark,
        "transform": transform.settings(),
        "pairs": pairs,
        "captions": captions,
        "shard_size": shard_size,
        "image_shards": where,
        "shards": shards,
        "corrupt": corrupt,
    }
    _write_json(folder / MANIFEST, record)
    return CachedPairs(folder, mark, dropped, pictures=min([2, *(len(pair["images"]) for pair in pairs)]))


class CachedPairs:
    """A finished cache as a source of examples, in place of images and encoders.

    Raises:
        CacheError: no finished cache is there, it was made with another model or transform (``expected``), or a shard
            is torn. Shards' checksums are verified when they are first read.

    Args:
        dropped: what stands in the place of a dropped caption; None is the pipeline's null prompt.
        pictures: how many images an example has: both of a pair, or 1, the chosen one. A cache of single pictures has
            no pairs; single pictures are also read from one of pairs.

    Attributes:
        counts: pairs that were to be encoded, and those that could not be read.
        contents: hash of all that examples are made of: model, transform, pairs and, by their shards, every value.
    """

    def __init__(
        self, folder: str | Path, expected: str | None = None, dropped: str | None = None, pictures: int = 2
    ) -> None:
        self.folder, self.dropped, self.pictures = Path(folder), dropped, pictures
        try:
            record = read_object(self.folder / MANIFEST)
        except (OSError, ValueError) as error:
            raise CacheError(
                f"{self.folder / MANIFEST} is missing or unreadable: run 'diffusion-align cache' ({error})"
            ) from error
        if expected is not None and record["fingerprint"] != expected:
            raise CacheError(
                f"cache {self.folder} was made with another model or other resolution, flip, interpolation or bucket "
                "settings: build it again in another folder"
            )
        self.pairs: list[dict[str, Any]] = record["pairs"]
        if any(len(pair["images"]) < pictures for pair in self.pairs):
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
        corrupt = record.get("corrupt", [])
        self.name, self.used = str(self.folder), len(self.pairs)
        self.counts = {"rows": self.used + len(corrupt), "unreadable": len(corrupt)}
        self.uncaptioned: list[str] = []
        self.caption_sample = [caption for caption in self.captions if caption]
        held = [record["fingerprint"], self.pairs, self.captions, self._shards]
        self.contents = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
        for name, facts in self._shards.items():
            self._check_size(name, facts)
        self._open: dict[str, Any] = {}

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
        parts = [self._image(name, flip) for name in pair["images"][: self.pictures]]
        posterior = (torch.stack([mean for mean, _ in parts]), torch.stack([std for _, std in parts]))
        sizes = pair["size_ids_flipped" if flip else "size_ids"][: self.pictures]
        size_ids = torch.tensor(sizes, dtype=torch.float32)
        caption = self.dropped if drop_caption else pair["caption"]
        return Example(
            caption,
            size_ids,
            pair["preference"],
            pair["weight"],
            pair["key"],
            posterior=posterior,
            cond=self._prompt(self._rows[caption]),
        )

    def _image(self, name: str, flip: bool) -> tuple[Tensor, Tensor]:
        shard = self._shard(self._image_shards[name])
        both = shard.get_tensor(f"{name}.flipped" if flip else name)
        return both[0], both[1]

    def _prompt(self, row: int) -> Conditioning:
        shard = self._shard(f"prompts-{row // self._shard_size:05d}.safetensors")
        pooled = shard.get_tensor(f"{row}.pooled")[None] if f"{row}.pooled" in shard.keys() else None  # noqa: SIM118
        return Conditioning(shard.get_tensor(f"{row}.embeds")[None], pooled)

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            if sha256_of(path) != self._shards[name]["sha256"]:
                raise CacheError(f"{path} does not match its checksum: run 'diffusion-align cache' again to rebuild it")
            self._open[name] = safe_open(str(path), framework="pt")
        return self._open[name]

    def _check_size(self, name: str, facts: dict[str, Any]) -> None:
        path = self.folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != facts["bytes"]:
            raise CacheError(
                f"{path} has {found} bytes, expected {facts['bytes']}: run 'diffusion-align cache' again to rebuild it"
            )


def _index(dataset: PairDataset, transform: PairTransform) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """What the manifest says of every readable pair; where each distinct image is found; messages of corrupt ones."""
    pairs: list[dict[str, Any]] = []
    images: dict[str, tuple[int, int, tuple[int, int]]] = {}
    corrupt: list[str] = []
    for index in range(len(dataset)):
        try:
            record = dataset[index]
            sides = record.images()
        except CorruptImageError as error:
            corrupt.append(str(error))
            continue
        target = transform.target(sides[0].size)
        names, ids, flipped = [], [], []
        for side, (content, image) in enumerate(zip(record.contents().values(), sides, strict=True)):
            name = hashlib.sha256(content + repr(target).encode()).hexdigest()[:32]
            images.setdefault(name, (index, side, target))
            names.append(name)
            ids.append(transform.crop(image, target, 0.5, 0.5, False)[1].tolist())
            flipped.append(transform.crop(image, target, 0.5, 0.5, True)[1].tolist())
        pairs.append(
            {
                "key": record.key,
                "caption": record.caption,
                "preference": record.preference,
                "weight": record.weight,
                "target": list(target),
                "images": names,
                "size_ids": ids,
                "size_ids_flipped": flipped,
            }
        )
    return pairs, images, corrupt


def _encode_images(
    adapter: Adapter,
    dataset: PairDataset,
    transform: PairTransform,
    images: dict[str, Any],
    names: list[str],
    batch_size: int,
) -> dict[str, Tensor]:
    """Mean and deviation (2, C, h, w) float16 of each image, and mirrored under NAME.flipped."""
    jobs: dict[tuple[int, int], list[tuple[str, Image.Image, bool]]] = {}
    for name in names:
        index, side, target = images[name]
        image = dataset[index].images()[side]
        for flip in (False, True) if transform.random_flip else (False,):
            jobs.setdefault(target, []).append((name + (".flipped" if flip else ""), image, flip))
    tensors: dict[str, Tensor] = {}
    for target, group in jobs.items():
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            pixels = torch.stack([transform.crop(image, target, 0.5, 0.5, flip)[0] for _, image, flip in part])
            mean, std = adapter.encode_posterior(pixels)
            for i, (name, _, _) in enumerate(part):
                tensors[name] = torch.stack([mean[i], std[i]]).half().cpu()
    return tensors


def _encode_prompts(adapter: Adapter, captions: list[str | None], first: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for start in range(0, len(captions), CHUNK):
        cond = encode_in_chunks(adapter, captions[start : start + CHUNK])
        for i in range(len(cond)):
            tensors[f"{first + start + i}.embeds"] = cond.embeds[i].half().cpu()
            if cond.pooled is not None:
                tensors[f"{first + start + i}.pooled"] = cond.pooled[i].half().cpu()
    return tensors


def _kept_shards(folder: Path, mark: str) -> dict[str, dict[str, Any]]:
    """Shards of an earlier build with the same model; those of another model are built again."""
    try:
        record = read_object(folder / "shards.json")
    except (OSError, ValueError):
        return {}
    shards: dict[str, dict[str, Any]] = record["shards"]
    return shards if record["fingerprint"] == mark else {}


def _is_whole(path: Path, facts: dict[str, Any]) -> bool:
    try:
        with safe_open(str(path), framework="pt"):
            return sha256_of(path) == facts["sha256"]
    except (OSError, SafetensorError):
        return False


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_tensors(path, tensors)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(with_checksum(value)).encode())


def _tuples(buckets: list[list[int]] | None) -> tuple[tuple[int, int], ...] | None:
    return None if buckets is None else tuple((height, width) for height, width in buckets)
