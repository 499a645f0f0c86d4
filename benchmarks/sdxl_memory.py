"""Memory of SDXL training at its true size, counted on the ``meta`` device by what ``train --dry-run`` uses."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.policy.costs.memory import estimate_memory

from .harness import write_result
from .sdxl import CLIP_BIG_G, CLIP_L, UNET, VAE

GIB = 2**30
BF16: dict[str, Any] = {"weight_dtype": "bf16", "mixed_precision": "bf16"}
ROWS: dict[str, dict[str, Any]] = {
    "LoRA, 1 pair, checkpointing full": {"gradient_checkpointing": "full"},
    "LoRA, 1 pair, checkpointing full, SDXL's own VAE in fp32": {"gradient_checkpointing": "full", "vae": "own-vae"},
    "LoRA, 1 pair, checkpointing full, cached": {"gradient_checkpointing": "full", "cache_dir": "cache"},
    "LoRA, 1 pair, checkpointing attention, cached": {"gradient_checkpointing": "attention", "cache_dir": "cache"},
    "LoRA, 1 pair, no checkpointing, cached": {"cache_dir": "cache"},
    "LoRA, 4 pairs, checkpointing attention, cached": {
        "gradient_checkpointing": "attention",
        "cache_dir": "cache",
        "per_device_train_batch_size": 4,
    },
    "full, 1 pair, checkpointing full, Adafactor": {
        "full_finetuning": True,
        "gradient_checkpointing": "full",
        "optim": "adafactor",
    },
    "full, 8 pairs, checkpointing full, Adafactor": {
        "full_finetuning": True,
        "gradient_checkpointing": "full",
        "optim": "adafactor",
        "per_device_train_batch_size": 8,
    },
    "full, 8 pairs, checkpointing full, AdamW": {
        "full_finetuning": True,
        "gradient_checkpointing": "full",
        "per_device_train_batch_size": 8,
    },
}
#: Runs of several cards: each holds its gradients twice.
CARDS = {"full, 8 pairs, checkpointing full, Adafactor": 8, "full, 8 pairs, checkpointing full, AdamW": 8}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sdxl-memory", description=__doc__)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder))
        for name, changes in ROWS.items():
            changes = changes | ({"vae": f"{folder}/{changes['vae']}"} if "vae" in changes else {})
            config, cards = DPOConfig(model=folder, resolution=args.resolution, **BF16, **changes), CARDS.get(name, 1)
            estimate = estimate_memory(config, cards)
            assert estimate is not None
            facts = ("trained_parameters", "vae_in_backward", "prompt_cache")
            parts = {k: round(v / GIB, 2) for k, v in asdict(estimate).items() if k not in facts}
            row = {"run": name, "cards": cards, **parts, "total": round(estimate.total / GIB, 1)}
            rows.append(row | {"trained_parameters": estimate.trained_parameters})
            print(f"{row['total']:6.1f} GiB  {name}")
    write_result("sdxl_memory", {"resolution": args.resolution, "unit": "GiB", "rows": rows}, args.out)


def write_configs(folder: Path) -> None:
    """SDXL's folder layout with configs only."""
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    }
    configs = {
        "unet": {"_class_name": "UNet2DConditionModel", **UNET},
        "vae": {"_class_name": "AutoencoderKL", **VAE},
        "own-vae": {"_class_name": "AutoencoderKL", **VAE, "force_upcast": True},
        "text_encoder": {"model_type": "clip_text_model", **CLIP_L},
        "text_encoder_2": {"model_type": "clip_text_model", **CLIP_BIG_G},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
