"""DPO, InPO, KTO and supervised fine-tuning, from settings to something the loop can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from diffusion_align.adapters import ENCODERS, PARTS, Adapter
from diffusion_align.data import PairBatch
from diffusion_align.data.cache import CORRUPT, garbage
from diffusion_align.evaluation.report import Report
from diffusion_align.host_memory import keep_freed_memory
from diffusion_align.training.engine.protocols import Job, Method
from diffusion_align.training.engine.sharding import shards
from diffusion_align.training.engine.sourced_method import BatchSource
from diffusion_align.training.policy.flow_times import check_time_settings
from diffusion_align.training.policy.model import load_policy_model, prepare_policy
from diffusion_align.training.policy.validation import build_validator
from diffusion_align.training.policy.watching.watch_building import ValidationRules, build_watchdog
from diffusion_align.training.policy.watching.watch_report import add_watching

from .beyond_pairs.by_caption import build_order
from .beyond_pairs.config import KTOConfig
from .beyond_pairs.labelled import LabelledMethod
from .beyond_pairs.lists import ListMethod
from .config import DenoisingConfig, DPOConfig, InPOConfig, SFTConfig
from .denoising import training_path
from .left_out import add_data
from .loading import Ordering, build_pair_source, build_transform, make_cache, open_cache_first
from .method import PairMethod
from .noising import GaussianNoising, InvertedNoising, Noising
from .remembering import batch_reference, build_reference
from .supervised import SFTMethod
from .switches.curriculum import build_curriculum


def cache_pairs(config: DenoisingConfig) -> str | None:
    """Encode the data of ``config`` into ``config.cache_dir`` (or finish and repair it); says what is there then.

    Several processes make it together; all but the first have nothing to say.
    """
    state = PartialState(cpu=not torch.cuda.is_available())  # else processes on a CPU know nothing of each other
    keep_freed_memory(state.device)
    if config.cache_dir is None:
        raise ValueError("a cache needs cache_dir")
    adapter = load_policy_model(config, state.device, ENCODERS)
    cached = make_cache(config, adapter, build_transform(config, adapter))
    if not state.is_main_process:
        return None
    kind = "pictures" if config.pictures == 1 else cached.unit
    said = f"{config.cache_dir}: {len(cached)} {kind}, {len(cached.captions)} prompts, {cached.bytes / 2**20:.1f} MiB"
    unreadable, unneeded = cached.counts["unreadable"], garbage(config.cache_dir)
    if unreadable:
        listed = Path(config.cache_dir) / CORRUPT
        said += f"\n{unreadable} of {cached.counts['rows']} {kind} cannot be read and are left out, listed in {listed}"
    if unneeded:
        said += (
            f"\n{len(unneeded)} files ({sum(unneeded.values()) / 2**20:.1f} MiB) belong to no cache any more: "
            f"diffusion-align cache gc {config.cache_dir} removes them"
        )
    return said


def dpo_job(config: DPOConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: None = None) -> Job:
    """DPO and the other pairwise losses: noise is drawn."""
    return _pair_job(config, accelerator, adapter, lambda model: drawn_noise(config, model))


def inpo_job(config: InPOConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: None = None) -> Job:
    """InPO: noise is found by inversion."""
    return _pair_job(config, accelerator, adapter, lambda model: InvertedNoising(model, config))


def sft_job(config: SFTConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: None = None) -> Job:
    """Supervised fine-tuning on single pictures."""

    def build(policy: Adapter, source: BatchSource[PairBatch]) -> Method:
        return SFTMethod(config, policy, source, drawn_noise(config, policy), accelerator.autocast)

    return _denoising_job(config, accelerator, adapter, build)


def kto_job(config: KTOConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: None = None) -> Job:
    """KTO and BCO on labelled pictures."""

    def build(policy: Adapter, source: BatchSource[PairBatch]) -> Method:
        reference = batch_reference(config, policy)
        return LabelledMethod(config, policy, source, drawn_noise(config, policy), accelerator.autocast, reference)

    return _denoising_job(config, accelerator, adapter, build, partial(build_order, config))


def drawn_noise(config: DenoisingConfig, adapter: Adapter) -> GaussianNoising:
    """Gaussian noise as the settings ask for it."""
    path = training_path(config, adapter.path)
    return GaussianNoising(adapter, config.noise_offset, config.input_perturbation, path)


def _pair_job(
    config: DPOConfig, accelerator: Accelerator, adapter: Adapter | None, noising: Callable[[Adapter], Noising]
) -> Job:
    if config.reference_cache and shards():
        raise ValueError(
            "reference_cache: processes ask the reference for different pairs, which FSDP cannot: it gathers the parts "
            "of a network from all of them; set reference_cache to false, or launch with DDP"
        )
    if config.entanglement_steps and shards():
        raise ValueError(
            "entanglement_steps takes gradients of the whole trained weights, which FSDP cuts into parts: set it to 0, "
            "or launch with DDP"
        )

    def build(policy: Adapter, source: BatchSource[PairBatch]) -> Method:
        reference = build_reference(config, policy, source)
        method = ListMethod if config.is_list else PairMethod
        return method(config, policy, source, noising(policy), accelerator.autocast, reference)

    return _denoising_job(config, accelerator, adapter, build, partial(build_curriculum, config))


def _denoising_job(
    config: DenoisingConfig,
    accelerator: Accelerator,
    adapter: Adapter | None,
    build: Callable[[Adapter, BatchSource[PairBatch]], Method],
    order: Ordering | None = None,
) -> Job:
    """A run on pictures of a data set; ``build`` makes the method of the prepared policy and its batches."""
    own, cached = adapter is None, None
    if adapter is None:
        parts = PARTS
        if config.cache_dir is not None and not config.eval_steps:  # validation encodes prompts and decodes pictures
            cached = open_cache_first(config, accelerator.device, accelerator.is_main_process)
            parts = PARTS - ENCODERS
        adapter = load_policy_model(config, accelerator.device, parts)
    check_time_settings(config, adapter)
    if adapter.embeds_guidance and not adapter.path.straight:
        raise ValueError(
            f"{config.model} was distilled (unet: time_cond_proj_dim): {config.method} takes errors of predictions "
            "without guidance, which it does not make; train its base model, or use an online method"
        )
    prepare_policy(config, adapter)
    source = build_pair_source(config, adapter, accelerator.process_index, accelerator.num_processes, cached, order)
    name = "" if accelerator.is_main_process else f"_rank{accelerator.process_index}"
    unreadable = Path(config.output_dir) / f"corrupt_pairs{name}.jsonl"
    source.corruption.keep(unreadable, resumed=config.resume_from_checkpoint is not None)
    if own and cached is not None:
        adapter.park_encoders()  # that init_weights made necessary
    method = build(adapter, source)
    rules, folder = ValidationRules.of(config), Path(config.output_dir)
    validate = build_validator(config, adapter, folder, rules) if config.eval_steps else None

    def add_to(report: Report, lines: Sequence[Mapping[str, Any]]) -> None:
        add_watching(report, lines)
        add_data(folder, report)

    return Job(adapter, method, validate, add_to, build_watchdog(config, rules))
