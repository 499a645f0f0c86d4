"""From settings to batches of pairs, or of single pictures."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import PartialState

from diffusion_align.adapters import ENCODERS, Adapter
from diffusion_align.data import (
    MANIFEST,
    CachedPairs,
    CacheError,
    FixedDraws,
    PairBatch,
    PairDataset,
    PairLoader,
    PairTransform,
    PixelExamples,
    StreamedPairs,
    StreamLoader,
    build_cache,
    fingerprint,
    load_examples,
    load_in_file_order,
    load_pictures,
    make_buckets,
    require_same_data,
)
from diffusion_align.data.beyond_pairs.from_pairs import MadeOf, make_lists
from diffusion_align.data.beyond_pairs.ranked import ListSize, list_lengths, sized_lists
from diffusion_align.data.loader import Corruption
from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.relabelling import Relabelling, relabel, told
from diffusion_align.training.engine.sourced_method import BatchSource
from diffusion_align.training.policy.data_config import selection_seed
from diffusion_align.training.policy.model import load_policy_model

from .left_out import left_out

if TYPE_CHECKING:
    from .config import DenoisingConfig


#: Pairs of a data set, however they are held.
Pairs = PairDataset | CachedPairs | StreamedPairs
#: From pairs and the number of processes to the pair that stands at each position; of a stream there is no such order.
Ordering = Callable[[Pairs, int], Callable[[int], int] | None]


class PairSource(BatchSource[PairBatch], Protocol):
    """Batches of pairs, and the count of those that cannot be read."""

    corruption: Corruption


def build_pair_source(
    config: DenoisingConfig,
    adapter: Adapter,
    rank: int = 0,
    world_size: int = 1,
    cached: CachedPairs | None = None,
    order: Ordering | None = None,
) -> PairSource:
    """The pairs of ``config.dataset`` as an endless loader of this process's share.

    Args:
        cached: the cache in ``config.cache_dir``, if it is open already.
        order: makes an order of the pairs; None, here or from it: shuffled epochs.
    """
    transform = build_transform(config, adapter)
    options: dict[str, Any] = {
        "seed": config.seed,
        "rank": rank,
        "world_size": world_size,
        "caption_dropout": config.caption_dropout,
        "max_corrupt": config.max_corrupt,
    }
    batch_size, draws, dropped = config.per_device_train_batch_size, fixed_draws(config), dropped_caption(config)
    options["num_workers"] = config.dataloader_num_workers
    if config.cache_dir is not None:
        pairs: Pairs = cached or open_or_build_cache(config, adapter, transform, is_main=rank == 0)
    else:
        pairs = load_training_pairs(listed(relabelled(config, adapter.device, is_main=rank == 0), is_main=rank == 0))
    source: PairLoader | StreamLoader
    arranged = None if order is None else order(pairs, world_size)
    if isinstance(pairs, CachedPairs):
        source = PairLoader(pairs, batch_size, draws=draws, order=arranged, **options)
    elif isinstance(pairs, StreamedPairs):
        lists = size_of_lists(pairs, config)
        options |= {"buffer": config.shuffle_buffer, "dropped": dropped, "lists": lists}
        source = StreamLoader(pairs, transform, batch_size, **options)
    else:
        assert isinstance(pairs, PairDataset)
        examples = PixelExamples(pairs, transform, dropped, size_of_lists(pairs, config))
        source = PairLoader(examples, batch_size, draws=draws, order=arranged, **options)
    if rank == 0:
        said = left_out(pairs, source, adapter)
        said.say()
        if Path(config.output_dir).is_dir():
            said.write(Path(config.output_dir))
    return source


def size_of_lists(pairs: PairDataset | StreamedPairs, config: DenoisingConfig) -> ListSize | None:
    """How many pictures a list has in a batch; None of what are no lists.

    Raises:
        ValueError: lists on the hub, whose lengths are not known, without ``list_size``.
    """
    if pairs.meaning.unit != "ranked lists":
        return None
    lengths = None if pairs.used is None else list_lengths(pairs.cheap_columns())
    return sized_lists(lengths, config.most_listed, pairs.name)


def fixed_draws(config: DenoisingConfig) -> FixedDraws | None:
    """What ``noise_draws`` asks for."""
    return None if config.noise_draws is None else FixedDraws(config.seed, config.noise_draws)


def dropped_caption(config: DenoisingConfig) -> str | None:
    """What ``null_prompt`` puts in the place of a dropped caption; None is the pipeline's null prompt."""
    return {"pipeline": None, "encoded": ""}[config.null_prompt]


def build_transform(config: DenoisingConfig, adapter: Adapter) -> PairTransform:
    """Crop, flip and size of the training images.

    Raises:
        ValueError: a resolution the VAE cannot encode, or that gives no buckets.
    """
    resolution = config.resolution or adapter.default_resolution
    if resolution % adapter.vae_scale_factor:
        raise ValueError(
            f"resolution = {resolution} is not divisible by the VAE factor {adapter.vae_scale_factor} of {config.model}"
        )
    if resolution % adapter.side_factor:
        raise ValueError(
            f"resolution = {resolution} is not divisible by {adapter.side_factor}, the VAE factor times the patches of "
            f"{config.model}"
        )
    buckets = make_buckets(resolution, step=8 * adapter.vae_scale_factor) if config.aspect_ratio_buckets else None
    return PairTransform(resolution, config.random_crop, config.random_flip, buckets, config.interpolation)


def open_or_build_cache(
    config: DenoisingConfig, adapter: Adapter, transform: PairTransform, is_main: bool
) -> CachedPairs:
    """The cache in ``config.cache_dir``, made first when it is not there yet."""
    assert config.cache_dir is not None
    folder, dropped = Path(config.cache_dir), dropped_caption(config)
    if not (folder / MANIFEST).is_file():
        return make_cache(config, adapter, transform)
    cached = CachedPairs(folder, fingerprint(adapter, transform), dropped, config.pictures, config.most_listed)
    if cached.unit not in config.units:
        raise CacheError(
            f"cache {folder} holds {cached.unit}: method {config.method} with these settings learns from "
            f"{' or '.join(config.units)}; give another folder"
        )
    if is_main:
        check_cache(config, cached)
    PartialState().wait_for_everyone()
    return cached


def make_cache(config: DenoisingConfig, adapter: Adapter, transform: PairTransform) -> CachedPairs:
    """Make, finish or bring up to date the cache in ``config.cache_dir``: all processes together."""
    assert config.cache_dir is not None
    state = PartialState()
    return build_cache(
        adapter,
        cacheable_pairs(config),
        transform,
        config.cache_dir,
        max_corrupt=config.max_corrupt,
        progress=partial(print, flush=True),
        dropped=dropped_caption(config),
        settings=data_settings(config),
        workers=config.dataloader_num_workers,
        rank=state.process_index,
        world_size=state.num_processes,
        wait=state.wait_for_everyone,
        list_size=config.most_listed,
    )


def check_cache(config: DenoisingConfig, cached: CachedPairs) -> None:
    """Refuse a cache of other data than that of ``config``.

    A cache may outlive its data set: if that is out of reach, and the settings name the one that the cache was made of,
    this is warned of.

    Raises:
        CacheError: the data differs.
        OSError: the data set is out of reach, and the cache was made of another one.
    """
    try:
        pairs = cacheable_pairs(config)
    except OSError as error:
        if cached.data is not None and cached.data["settings"] != data_settings(config):
            raise
        warnings.warn(f"cache {cached.folder} is used without comparing it with its data set: {error}", stacklevel=2)
        return
    require_same_data(cached, pairs)


def data_settings(config: DenoisingConfig) -> dict[str, Any]:
    """What :func:`load_in_file_order` opens the data set of a run with."""
    return {
        "source": config.dataset,
        "split": config.dataset_split,
        "pictures": config.pictures,
        "streaming": config.streaming,
        "limit": config.max_pairs,
        "seed": None if config.max_pairs is None else selection_seed(config.pair_selection, config.seed),
    }


def cacheable_pairs(config: DenoisingConfig) -> PairDataset | StreamedPairs:
    """The pairs of ``config.dataset`` in the order of its files, without a copy of parquet files."""
    units = config.units if config.pictures == 2 else ("pairs",)
    return load_in_file_order(**data_settings(config), units=units)


def open_cache_first(config: DenoisingConfig, device: torch.device, is_main: bool) -> CachedPairs:
    """The cache in ``config.cache_dir``, by a model without its denoiser, which is freed before that is loaded."""
    made = (Path(config.cache_dir or "") / MANIFEST).is_file()
    # A cache that is there is only compared with the encoders' weights: no GPU needs to hold these for it.
    adapter = load_policy_model(config, "cpu" if made else device, ENCODERS)
    return open_or_build_cache(config, adapter, build_transform(config, adapter), is_main)


def relabelled(config: DenoisingConfig, device: torch.device, is_main: bool) -> DenoisingConfig:
    """Settings whose data set has the labels of ``relabel_with``, which are made first when they are not there yet."""
    if config.relabel_with is None:
        return config
    folder = Path(config.output_dir) / "relabelled"
    if is_main:
        limit, seed = config.max_pairs, selection_seed(config.pair_selection, config.seed)
        task = Relabelling(
            config.dataset, config.dataset_split, config.relabel_with, limit=limit, seed=seed,
            temperature=config.relabel_temperature,
        )  # fmt: skip
        scorer = load_scorer(config.relabel_with, device=device)
        say(told(relabel(task, scorer, folder, max_corrupt=config.max_corrupt, progress=say)))
    PartialState().wait_for_everyone()
    return replace(config, dataset=str(folder), relabel_with=None, relabel_temperature=None)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def listed(config: DenoisingConfig, is_main: bool) -> DenoisingConfig:
    """Settings whose data set has the lists of ``lists_from_pairs``, which are made first when they are not there."""
    if not config.makes_lists:
        return config
    folder = Path(config.output_dir) / "lists"
    if is_main:
        found = make_lists(MadeOf(config.dataset, config.dataset_split), folder, progress=say)
        say(", ".join(f"{count:,} {name}" for name, count in found.items() if count))
    PartialState().wait_for_everyone()
    return config.on_lists(str(folder))


def load_training_pairs(config: DenoisingConfig) -> PairDataset | StreamedPairs:
    """The examples of ``config.dataset``, ties dropped; of pairs for methods on single pictures, the chosen ones."""
    source, split, streaming, limit = config.dataset, config.dataset_split, config.streaming, config.max_pairs
    seed = selection_seed(config.pair_selection, config.seed)
    if config.pictures == 1:
        return load_pictures(source, split, streaming=streaming, limit=limit, seed=seed)
    return load_examples(source, split, config.units, streaming=streaming, limit=limit, seed=seed)
