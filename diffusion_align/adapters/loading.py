"""From a name to an adapter: hub repository, local folder, single checkpoint file, or a shipped scenes pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from diffusion_align.shipped import SHIPPED_MODELS, shipped_path

from .adapter import Adapter
from .autoencoder import check_vae_batch_size, stored_dtype
from .families import pipeline_classes


def load_adapter(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    revision: str | None = None,
    vae: str | None = None,
    config: str | None = None,
    family: str | None = None,
    vae_batch_size: int | None = None,
    vae_tiling: bool = False,
) -> Adapter:
    """Load a Stable Diffusion 1.x/2.x, SDXL or inpainting pipeline.

    Args:
        model: a shipped name ("scenes-sdxl"), a folder with ``model_index.json``, a single ``.safetensors`` checkpoint
            (the layout of CompVis and Stability), or a hub name ("stabilityai/stable-diffusion-xl-base-1.0").
        dtype: of the UNet, text encoders and VAE. SDXL's VAE overflows in half precision: it is float32, unless its
            config says ``force_upcast: false``.
        variant, revision: as in ``from_pretrained`` ("fp16").
        vae: another autoencoder, e.g. "madebyollin/sdxl-vae-fp16-fix".
        config: for a single file, a folder or hub name with the pipeline's configs and tokenizers (needed offline).
        family: for a single file, one of "sd", "sdxl", "sd-inpaint", "sdxl-inpaint" (default "sdxl").
        vae_batch_size, vae_tiling: as in ``Adapter.code_in_chunks``.

    Raises:
        FileNotFoundError: ``model`` looks like a path but nothing is there, or the folder has no model_index.json.
        OSError: a hub name that cannot be downloaded; the message says how to give a local path.
        ValueError: a pipeline of an unsupported family, or ``vae_batch_size`` below 1.
    """
    check_vae_batch_size(vae_batch_size)
    parts: dict[str, Any] = {}
    if vae is not None:
        parts["vae"] = AutoencoderKL.from_pretrained(vae, dtype=torch.float32)
    name = str(model)
    if name in SHIPPED_MODELS:
        name = str(shipped_path(name))
    path = Path(name)
    if path.is_file():
        pipeline = _load_single_file(path, config, family or "sdxl", parts | {"dtype": dtype})
    else:
        if path.is_dir() and not (path / "model_index.json").is_file():
            raise FileNotFoundError(f"{path} is no diffusers pipeline: expected a model_index.json in it")
        if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") != 1):
            shipped = ", ".join(SHIPPED_MODELS)
            raise FileNotFoundError(
                f"model {name!r} not found: expected a pipeline folder, a .safetensors file, a hub name such as "
                f"'stabilityai/stable-diffusion-xl-base-1.0', or one of: {shipped}"
            )
        # A VAE that stays float32 must not be rounded on its way there.
        parts["dtype"] = {"default": dtype, "vae": torch.float32}
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                name, variant=variant, revision=revision, use_safetensors=True, **parts
            )
        except OSError as error:
            raise OSError(
                f"model {name!r} could not be loaded ({error}). Offline, download it once with "
                f"'hf download {name}' and give the folder instead"
            ) from error
    adapter = Adapter(pipeline)
    wanted = stored_dtype(dtype, adapter.family.vae_overflows, adapter.vae.config.force_upcast)
    nn.Module.to(adapter.vae, wanted)  # diffusers' own .to warns of an empty list of modules
    return adapter.code_in_chunks(vae_batch_size, vae_tiling).to(device)


def _load_single_file(path: Path, config: str | None, family: str, parts: dict[str, Any]) -> Any:
    classes = pipeline_classes()
    if family not in classes:
        raise ValueError(f"unknown family {family!r} for the single file {path}: expected one of {sorted(classes)}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors checkpoints are read (pickled .ckpt files can run code)")
    read: Any = classes[family]
    return read.from_single_file(str(path), config=config, local_files_only=config is not None, **parts)
