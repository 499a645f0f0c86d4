"""``diffusion-align generate``: prompts in, PNG files out."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .adapters import load_adapter
from .data import load_prompts
from .options import GenerateOptions
from .sampling.sampler import generate, to_uint8

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The named device, or for "auto" the best one that is there."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def generate_files(options: GenerateOptions) -> list[Path]:
    """Draw every prompt ``num_images`` times; each PNG's ``diffusion-align`` text chunk holds prompt, seed and options.

    Raises:
        ValueError, FileNotFoundError, OSError: prompts, model or weights that cannot be used.
    """
    prompts = [options.prompt] if options.prompt is not None else load_prompts(options.prompts or "")
    device = pick_device(options.device)
    dtype = DTYPES["fp16" if device.type == "cuda" else "fp32"] if options.dtype == "auto" else DTYPES[options.dtype]
    adapter = load_adapter(options.model, dtype=dtype, device=device, config=options.model_config)
    if options.lora is not None:
        adapter.load_weights(options.lora)
    jobs = [(prompt, options.seed + i) for prompt in prompts for i in range(options.num_images)]
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    # One batch at a time, so that the pictures of a long list appear, and stay, as they are drawn.
    for start in range(0, len(jobs), options.batch_size):
        batch = jobs[start : start + options.batch_size]
        images = generate(
            adapter,
            [prompt for prompt, _ in batch],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            seeds=[seed for _, seed in batch],
            height=options.height,
            width=options.width,
            batch_size=options.batch_size,
            negative_prompts=None if options.negative_prompt is None else [options.negative_prompt] * len(batch),
        )
        for i, ((prompt, seed), pixels) in enumerate(zip(batch, to_uint8(images), strict=True), start=start):
            facts = PngInfo()
            facts.add_text("diffusion-align", json.dumps({**asdict(options), "prompt": prompt, "seed": seed}))
            path = folder / f"{i:05d}-{slug(prompt)}-{seed}.png"
            Image.fromarray(pixels).save(path, pnginfo=facts)
            written.append(path)
    return written


def slug(text: str, limit: int = 48) -> str:
    """A file name's worth of ``text``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:limit].rstrip("-") or "image"
