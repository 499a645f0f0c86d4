"""``diffusion-align export``: a run's weights as diffusers, ComfyUI, kohya's scripts or a whole pipeline take them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from diffusion_align.adapters import PARTS, Adapter
from diffusion_align.adapters.autoencoder import stored_dtype
from diffusion_align.adapters.loading import LENGTH_FIELD
from diffusion_align.adapters.lora_files import find_lora_file
from diffusion_align.adapters.policy_files import OTHER_BASE, OWN_BASE, base_of, write_lora
from diffusion_align.devices import DTYPES
from diffusion_align.files import sealed_folder
from diffusion_align.quiet import no_loading_bars
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.policy.model import load_policy_model
from diffusion_align.training.policy.model_options import ModelOptions
from diffusion_align.training.settings import load_run

from .console import conclude, note
from .options import ExportOptions


def export_weights(options: ExportOptions) -> Path:
    """Write the weights in ``options.format``; returns the file or folder.

    Raises:
        FileNotFoundError: no such run, or nothing to export in it.
        ValueError: a run whose model is not known, one without a LoRA where a LoRA is asked for, or an ``out`` that is
            already there.
    """
    source = Path(options.run)
    if not source.exists():
        raise FileNotFoundError(f"--run {source}: no such file or folder")
    out = output_path(options)
    if out.exists():
        raise ValueError(f"--out {out} is already there: delete it, or give another")
    only_lora = options.format != "merged" and find_lora_file(source) is not None  # its names are those of the configs
    parts = frozenset() if only_lora else PARTS
    adapter = load_policy_model(settings(options), "cpu", parts).load_weights(source)
    if options.format == "merged":
        return save_merged(adapter, out, "fp32" if options.dtype == "auto" else options.dtype)
    if not adapter.has_lora:
        raise ValueError(f"{source} holds all weights of the network and no LoRA: export it with --format merged")
    if not adapter.loras.own_base:
        note(f"note: {out} fits the model with its init_weights only; --format merged holds both")
    return write_lora(adapter.loras, out, options.format, out.stem)


def settings(options: ExportOptions) -> TrainConfig:
    """The settings that load the model which the weights are for: of the run, with the flags of the command line.

    Raises:
        ValueError: no config.yaml and no --model, one of a run that trains no diffusion model, or weights on top of
            others that it does not name.
    """
    config = load_run(options.run)
    if config is None and not options.model:
        raise ValueError(f"{options.run} has no config.yaml: give --model, the model that the weights are for")
    if config is not None and not isinstance(config, TrainConfig):
        raise ValueError(f"{options.run} is a run of {config.method}, which trains no diffusion model")
    config = config or TrainConfig()
    file = find_lora_file(Path(options.run))
    base = None if file is None else base_of(file)
    if base == OTHER_BASE and config.init_weights is None and not options.model:
        raise ValueError(f"{file} was trained on weights that no file names: give --model, a pipeline that holds them")
    given: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(ModelOptions) if f.name != "dtype"}
    return replace(
        config,
        **{name: value for name, value in given.items() if value},
        init_weights=None if file is None or base == OWN_BASE else config.init_weights,
        dtype="fp32",
        full_finetuning=False,
    )


def output_path(options: ExportOptions) -> Path:
    """``--out``, or a name made of the run's, beside it."""
    if options.out is not None:
        return Path(options.out)
    source = Path(options.run).resolve()
    name = source.stem if source.is_file() else source.name
    folder = source.parent
    if (folder / "config.yaml").is_file():  # of a checkpoint: not into its run, which would take it for another one
        folder, name = folder.parent, f"{folder.name}-{name}"
    return folder / (f"{name}-merged" if options.format == "merged" else f"{name}-{options.format}.safetensors")


def save_merged(adapter: Adapter, folder: Path, dtype: str) -> Path:
    """The whole pipeline with the weights folded in; returns its folder."""
    adapter.fold_loras()
    for module in (adapter.network, *adapter.text_encoders):
        nn.Module.to(module, DTYPES[dtype])  # diffusers' own warns of parts that it keeps in float32, even of none
    vae = stored_dtype(DTYPES[dtype], adapter.family.vae_overflows, adapter.vae.config.force_upcast)
    nn.Module.to(adapter.vae, vae)
    if adapter.max_sequence_length is not None:
        adapter.pipeline.register_to_config(**{LENGTH_FIELD: adapter.max_sequence_length})
    with sealed_folder(folder), no_loading_bars():
        adapter.pipeline.save_pretrained(folder)
    return folder


def run(options: ExportOptions) -> int:
    """Export, and print what was written; returns the exit status."""
    written = export_weights(options)
    conclude(written, {"weights": str(written)})
    return 0
