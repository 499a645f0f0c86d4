"""What a policy takes over at most: trained on flawless pictures for as many denoiser calls as the online loop has.

Rendered scenes show everything that their captions ask for; nobody has to find or judge them. What fine-tuning on
them gains in prompt-following is what the loop could gain from the best pictures that a judge can hope for. ``lora``
are the loop's own weights; ``full`` trains the whole UNet; ``full, four times as long`` has four times the calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from diffusion_align.adapters import load_adapter
from diffusion_align.files import write_parquet
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.scenes.make.pairs import encode_jpeg
from diffusion_align.scenes.world.grammar import sample_prompt, sample_scene
from diffusion_align.scenes.world.render import render
from diffusion_align.training.pairs.config import SFTConfig
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_recipe

from ..harness import folder_name
from .online_methods import denoiser_calls
from .panel import Panel

SEED, PICTURES, BATCH = 4711, 8_000, 64

#: How each is trained, and in how many times the loop's calls.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "lora": ({"learning_rate": 1.0e-3}, 1),
    "full": ({"learning_rate": 3.0e-4, "full_finetuning": True}, 1),
    "full, four times as long": ({"learning_rate": 3.0e-4, "full_finetuning": True}, 4),
}


def taught(calls: int, panel: Panel, work: Path, name: str) -> dict[str, Any]:
    """Fine-tune in one of ``WAYS`` for ``calls`` denoiser calls, times the way's number, and look at the policy."""
    options, times = WAYS[name]
    config = load_recipe(
        "scenes_sft",
        dataset=str(rendered(work / "flawless.parquet")),
        output_dir=str(work / folder_name(name)),
        overwrite_output_dir=True,
        per_device_train_batch_size=BATCH,
        max_steps=max(1, times * calls // (3 * BATCH)),
        progress=False,
        report_to="none",
        **options,
    )
    assert isinstance(config, SFTConfig)
    adapter = load_adapter(config.model)
    train(config, adapter)
    return {
        "denoiser_calls": denoiser_calls(config),
        "optimiser_steps": config.max_steps,
        "settings": options,
        **panel.take(adapter).to_json(),
    }


def rendered(path: Path) -> Path:
    """A parquet file of scenes and their captions, none of them of a held-out prompt, unless it is there."""
    if path.is_file():
        return path
    rng, kept_back = np.random.default_rng(SEED), set(held_out_prompts(250))
    columns: dict[str, list[Any]] = {"image": [], "caption": []}
    while len(columns["caption"]) < PICTURES:
        prompt = sample_prompt(rng)
        if prompt.text() not in kept_back:
            columns["image"].append(encode_jpeg(render(sample_scene(prompt, rng))))
            columns["caption"].append(prompt.text())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, Dataset.from_dict(columns))
    return path
