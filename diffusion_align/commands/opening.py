"""From a command's options to the model that it draws with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from diffusion_align.adapters import Adapter
from diffusion_align.adapters.policy_files import Source
from diffusion_align.adapters.prompts import cut_prompts
from diffusion_align.devices import DTYPES
from diffusion_align.shipped import EVALUATOR_OF
from diffusion_align.training.policy.model import load_model

from .console import note
from .options import DrawingOptions


def open_model(options: DrawingOptions, device: torch.device) -> Adapter:
    """The model on ``device``, with trained weights if there are any.

    dtype auto is fp32 on the CPU and fp16 on CUDA, bf16 there for families that leave fp16's range.

    Raises:
        ValueError, FileNotFoundError, OSError: as ``load_adapter`` and ``Adapter.load_weights``.
    """
    name, chosen = options.dtype, options.dtype == "auto"
    if chosen:
        name = "fp16" if device.type == "cuda" else "fp32"
    return load_model(options, DTYPES[name], device, bf16_instead=chosen).load_weights(*options.lora)


def open_contrastive(
    options: DrawingOptions, device: torch.device, negative: Sequence[str], keep: float, merge: float | None
) -> Adapter:
    """As ``open_model``, with a negative model beside it, or merged once: base + ``merge`` (LoRAs - negative LoRAs).

    Raises:
        ValueError, FileNotFoundError, OSError: as ``open_model`` and ``Adapter.load_negative``.
    """
    if not negative:
        return open_model(options, device)
    if merge is None:
        return open_model(options, device).load_negative(*negative, keep=keep)
    return open_model(replace(options, lora=contrasted(options.lora, negative, merge)), device)


def evaluator_for(model: str, given: str | None) -> str:
    """The evaluator of dynamic guidance: ``given``, or the one that was trained on a shipped model's latents.

    Raises:
        ValueError: neither.
    """
    if given is None and model not in EVALUATOR_OF:
        raise ValueError(
            f"dynamic guidance needs --evaluator: none comes with {model}. Train one with "
            f"'diffusion-align train evaluator --model {model}', or give latent-clip:PATH or lrm:FOLDER"
        )
    return EVALUATOR_OF[model] if given is None else given


def say_what_is_cut(adapter: Adapter, prompts: Sequence[str]) -> None:
    """One line on stderr where prompts are longer than the model's text encoders read."""
    cut = sorted(cut_prompts(adapter, prompts))
    if cut:
        note(
            f"note: {len(cut)} of {len(prompts)} prompts are longer than the text encoder reads, and are cut, e.g. "
            f"{prompts[cut[0]][:60]!r}"
        )


def contrasted(positive: Sequence[str], negative: Sequence[str], weight: float) -> tuple[str, ...]:
    """Sources that together are weight (delta_positive - delta_negative), for ``Adapter.load_weights`` (2602.18799)."""
    parsed = [(Source.parse(text), sign) for texts, sign in ((positive, 1), (negative, -1)) for text in texts]
    return tuple(f"{source.path}:{sign * weight * source.weight:g}" for source, sign in parsed)
