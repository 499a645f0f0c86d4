"""From settings to a finished run: ``train(DPOConfig(...))``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.data import StreamedPairs, build_cache, load_prompts
from diffusion_align.data.inpainting import load_holes, open_inpainting
from diffusion_align.evaluation.compare import SamplingSettings
from diffusion_align.precision import computes_bf16
from diffusion_align.rewards import RewardScorer, load_scorer

from .checkpoint import CheckpointError, list_checkpoints
from .config import DPOConfig, EvaluatorConfig, InPOConfig, RewardConfig, RunConfig, TrainConfig
from .dpo import GaussianNoising
from .dtypes import DTYPES
from .evaluator import evaluator_job
from .inpo import InvertedNoising
from .loop import Job, TrainResult, run_loop
from .online import online_method
from .online_config import DRaFTConfig, GRPOConfig, InpaintRLConfig, NFTConfig, OnlineConfig, RAFTConfig
from .pairs import Noising, PairMethod
from .randomness import MASKS, mix
from .remembering import build_reference
from .report import write_online_report
from .reward import reward_job
from .settings import save_config, to_dict, validated
from .source import build_pair_source, build_transform, load_training_pairs
from .tasks import training_prompts
from .validation import Validator


def train(config: RunConfig, adapter: Adapter | None = None, scorer: RewardScorer | None = None) -> TrainResult:
    """Run the method that ``config`` belongs to.

    Args:
        config: e.g. ``DPOConfig(model="scenes-sdxl", max_steps=100)``.
        adapter: an already loaded diffusion model to train instead of ``config.model``; it keeps the trained policy.
        scorer: an already loaded reward to learn from instead of ``config.scorers`` (evaluator: ``config.teacher``).

    Raises:
        ValueError, FileNotFoundError, OSError: settings, model or data that cannot be used; the message names what.
            Also a scorer for a method that learns from none, or a model for the training of a scorer.
        CheckpointError: nothing to resume from, or checkpoints of an earlier run would be mixed with this one's.
    """
    config = validated(type(config), {k: v for k, v in to_dict(config).items() if k != "method"}, type(config).__name__)
    if scorer is not None and not isinstance(config, OnlineConfig | EvaluatorConfig):
        raise ValueError(f"scorer: method {config.method} learns from no scorer, but one was given")
    if adapter is not None and isinstance(config, RewardConfig):
        raise ValueError("adapter: method reward trains a scorer, but a diffusion model was given")
    output_dir = Path(config.output_dir)
    prepare_folder(config, output_dir)
    accelerator = build_accelerator(config)
    config = replace(config, mixed_precision=accelerator.mixed_precision)  # what auto came to is saved with the run
    set_seed(config.seed, device_specific=True)  # of dropout; everything else is drawn from the samples' own seeds
    job = JOBS[config.method](config, accelerator, adapter, scorer)
    if accelerator.is_main_process:
        save_config(config, output_dir / "config.yaml")
    if config.report_to != "none":
        flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in to_dict(config).items()}
        accelerator.init_trackers("diffusion-align", config=flat)
    validate = job.validate if accelerator.is_main_process and config.eval_steps else None
    result = run_loop(config, job.trained, job.method, accelerator, validate)
    if isinstance(config, OnlineConfig) and accelerator.is_main_process:
        write_online_report(config)
    return result


def prepare_folder(config: RunConfig, output_dir: Path) -> None:
    """Make the run's folder, and refuse to mix two runs in one."""
    existing = list_checkpoints(output_dir)
    if existing and config.overwrite_output_dir:
        for checkpoint in existing:
            shutil.rmtree(checkpoint)
    elif existing and config.resume_from_checkpoint is None:
        raise CheckpointError(
            f"output_dir {output_dir} holds {existing[-1].name} of an earlier run: pass "
            "--resume-from-checkpoint latest to go on with it, --overwrite-output-dir to start anew, "
            "or another --output-dir"
        )
    output_dir.mkdir(parents=True, exist_ok=True)


def build_accelerator(config: RunConfig) -> Accelerator:
    """One accelerator per run; settings of an earlier run in the same Python process do not stick."""
    AcceleratorState._reset_state(reset_partial_state=False)
    tracker = None if config.report_to == "none" else config.report_to
    precision: str = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if computes_bf16("cuda" if torch.cuda.is_available() else "cpu") else "no"
    return Accelerator(
        mixed_precision=precision,
        log_with=tracker,
        project_dir=config.output_dir,
        cpu=not torch.cuda.is_available(),
    )


def load_policy_model(config: TrainConfig, device: torch.device | str) -> Adapter:
    """The adapter of ``config.model``, with ``init_weights`` merged into it."""
    adapter = load_adapter(
        config.model,
        dtype=DTYPES[config.weight_dtype],
        device=device,
        variant=config.variant,
        vae=config.vae,
        config=config.model_config,
        vae_batch_size=config.vae_batch_size,
        vae_tiling=config.vae_tiling,
    )
    if config.init_weights is not None:
        adapter.load_weights(config.init_weights)
        if adapter.pipeline.get_active_adapters():
            adapter.pipeline.fuse_lora()
            adapter.pipeline.unload_lora_weights()
    return adapter


def prepare_policy(config: TrainConfig, adapter: Adapter) -> None:
    """Choose what is trained and how the UNet runs."""
    if config.full_finetuning:
        adapter.train_full(reference_dtype=DTYPES[config.weight_dtype])
    else:
        adapter.train_lora(
            config.lora_rank, config.lora_alpha, config.lora_target_modules, config.lora_dropout, config.seed
        )
    if config.channels_last:
        adapter.unet.to(memory_format=torch.channels_last)
    adapter.optimize(config.gradient_checkpointing, config.attention, config.torch_compile)
    adapter.code_in_chunks(config.vae_batch_size, config.vae_tiling)


def cache_pairs(config: DPOConfig) -> str:
    """Encode the data of ``config`` into ``config.cache_dir`` (or finish and repair it); says what is there then."""
    adapter = load_policy_model(config, PartialState().device)
    pairs = load_training_pairs(config)
    if isinstance(pairs, StreamedPairs) or config.cache_dir is None:
        raise ValueError("a cache needs cache_dir and a data set with random access: set streaming to false")
    transform = build_transform(config, adapter)
    cached = build_cache(adapter, pairs, transform, config.cache_dir, max_corrupt=config.max_corrupt, progress=print)
    size = sum(path.stat().st_size for path in Path(config.cache_dir).glob("*.safetensors"))
    return f"{config.cache_dir}: {len(cached)} pairs, {len(cached.captions)} prompts, {size / 2**20:.1f} MiB"


def pair_job(config: RunConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: None) -> Job:
    """DPO or InPO, which differ in their noise only."""
    assert isinstance(config, DPOConfig)
    own = adapter is None
    if adapter is None:
        adapter = load_policy_model(config, accelerator.device)
    prepare_policy(config, adapter)
    source = build_pair_source(config, adapter, accelerator.process_index, accelerator.num_processes)
    if own and config.cache_dir is not None and not config.eval_steps:
        adapter.park_encoders()
    noising: Noising = InvertedNoising(adapter, config) if isinstance(config, InPOConfig) else GaussianNoising(adapter)
    reference = build_reference(config, adapter, source)
    method = PairMethod(config, adapter, source, noising, accelerator.autocast, reference)
    validate = build_validator(config, adapter, Path(config.output_dir)) if config.eval_steps else None
    return Job(adapter, method, validate)


def online_job(
    config: RunConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: RewardScorer | None
) -> Job:
    """A method that learns from its own pictures."""
    assert isinstance(config, OnlineConfig)
    if adapter is None:
        adapter = load_policy_model(config, accelerator.device)
    prepare_policy(config, adapter)
    method = online_method(config, adapter, accelerator, scorer)
    validate = build_validator(config, adapter, Path(config.output_dir)) if config.eval_steps else None
    return Job(adapter, method, validate)


JOBS: Mapping[str, Callable[[Any, Accelerator, Any, Any], Job]] = MappingProxyType(
    {
        DPOConfig.method: pair_job,
        InPOConfig.method: pair_job,
        **{cls.method: online_job for cls in (InpaintRLConfig, GRPOConfig, NFTConfig, RAFTConfig, DRaFTConfig)},
        RewardConfig.method: lambda config, accelerator, adapter, scorer: reward_job(config, accelerator),
        EvaluatorConfig.method: evaluator_job,
    }
)


def build_validator(config: TrainConfig, adapter: Adapter, output_dir: Path) -> Validator:
    """Validation on the prompts of a file, or on captions (for inpainting, pictures) of the validation split."""
    settings = SamplingSettings(
        config.validation_inference_steps, config.validation_guidance_scale, config.validation_seed
    )
    held_out = getattr(config, "held_out_scorers", ())
    count, holes = config.num_validation_prompts, None
    if adapter.is_inpainting and isinstance(config, OnlineConfig):
        source = open_inpainting(config.dataset, "validation")
        count, size = min(count, len(source)), config.resolution or adapter.default_resolution
        seeds = [mix(config.validation_seed, MASKS, i) for i in range(count)]
        holes = load_holes(source, range(count), seeds, size, config.mask_kinds)
        prompts = holes.prompts
    elif config.validation_prompts is not None:
        prompts = load_prompts(config.validation_prompts)
    elif isinstance(config, DPOConfig | OnlineConfig):
        prompts = training_prompts(config.dataset, "validation")
    else:
        raise ValueError(f"eval_steps = {config.eval_steps} needs validation_prompts, a file with one prompt a line")
    return Validator(
        adapter,
        prompts[:count],
        output_dir / "samples",
        None if config.validation_scorer is None else load_scorer(config.validation_scorer),
        settings,
        holes,
        {name: load_scorer(name) for name in held_out},
    )
