"""From settings to a finished run: ``train(DPOConfig(...))``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from diffusion_align.adapters import Adapter
from diffusion_align.host_memory import keep_freed_memory
from diffusion_align.rewards import RewardScorer

from .engine.accelerator import build_accelerator, prepare_folder
from .engine.config import RunConfig
from .engine.loop import TrainResult, run_loop
from .engine.reporting.run_report import write_run_report
from .engine.resuming import resumed_checkpoint
from .methods import build_job
from .policy.config import TrainConfig
from .policy.costs.relief import with_advice
from .policy.last_pictures import draw_last_pictures
from .settings import save_config, to_dict, validated


def train(
    config: RunConfig,
    adapter: Adapter | None = None,
    scorer: RewardScorer | None = None,
    *,
    last_pictures: bool = False,
) -> TrainResult:
    """Run the method that ``config`` belongs to.

    Args:
        config: e.g. ``DPOConfig(model="scenes-sdxl", max_steps=100)``.
        adapter: an already loaded diffusion model to train instead of ``config.model``; it keeps the trained policy.
        scorer: an already loaded reward to learn from instead of ``config.scorers`` (evaluator: ``config.teacher``).
        last_pictures: draw ``config.final_pictures`` prompts at the end of a run without validation.

    Raises:
        ValueError, FileNotFoundError, OSError: settings, model or data that cannot be used; the message names what.
            Also a scorer for a method that learns from none, or a model for the training of a scorer.
        OSError: also a folder that cannot be written, before anything is loaded.
        RuntimeError: out of memory, with the settings that would help most.
        CheckpointError: nothing to resume from, a checkpoint of a run with other settings that cannot change on the
            way, or checkpoints of an earlier run would be mixed with this one's.
    """
    config = validated(type(config), {k: v for k, v in to_dict(config).items() if k != "method"}, type(config).__name__)
    if scorer is not None and not config.takes_scorer:
        raise ValueError(f"scorer: method {config.method} learns from no scorer, but one was given")
    if adapter is not None and not config.takes_model:
        raise ValueError(f"adapter: method {config.method} trains a scorer, but a diffusion model was given")
    output_dir = Path(config.output_dir)
    prepare_folder(config, output_dir)
    accelerator = build_accelerator(config)
    keep_freed_memory(accelerator.device)
    config = replace(config, mixed_precision=accelerator.mixed_precision)  # what auto came to is saved with the run
    set_seed(config.seed, device_specific=True)  # of dropout; everything else is drawn from the samples' own seeds
    checkpoint = None
    if config.resume_from_checkpoint is not None:
        checkpoint, notes = resumed_checkpoint(config, output_dir, accelerator.num_processes)
        for note in notes:
            accelerator.print(note, file=sys.stderr)
    with with_advice(config):
        return _run(config, accelerator, adapter, scorer, checkpoint, last_pictures)


def _run(
    config: RunConfig,
    accelerator: Accelerator,
    adapter: Adapter | None,
    scorer: RewardScorer | None,
    checkpoint: Path | None,
    last_pictures: bool,
) -> TrainResult:
    """From checked settings and a folder that can be written to the end."""
    job = build_job(config, accelerator, adapter, scorer)
    output_dir = Path(config.output_dir)
    if accelerator.is_main_process:
        save_config(config, output_dir / "config.yaml")
    if config.report_to != "none":
        flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in to_dict(config).items()}
        accelerator.init_trackers("diffusion-align", config=flat)
    validate = job.validate if config.eval_steps else None
    result = run_loop(config, job.trained, job.method, accelerator, validate, checkpoint, watchdog=job.watchdog)
    whole = result.stopped is None or result.ended_early
    shown = last_pictures and whole and validate is None
    if shown and isinstance(config, TrainConfig) and isinstance(job.trained, Adapter) and config.final_pictures:
        lacking = draw_last_pictures(config, job.trained, accelerator.device, result.step)
        if lacking is not None:
            print(f"no pictures of the trained model: {lacking}", file=sys.stderr)
    if accelerator.is_main_process:
        write_run_report(config, result.step, result.stopped, job.report)
    return result
