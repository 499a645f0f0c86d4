"""Folders of rendered scenes that say what they were made for, as ``generate`` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_align.scenes.world.grammar import parse_prompt, sample_scene
from diffusion_align.scenes.world.render import render

PROMPTS = (
    "two small blue rings on a dark background",
    "a large red star on a dark background",
    "a green square on the left on a light background",
    "three yellow circles on a grey background",
)
SEEDS = (5, 6)


def gallery(folder: Path, noise: int, right: float = 1.0, record: bool = True) -> Path:
    """Two pictures of each prompt; a share of them shows what it should, the others another prompt's scene."""
    folder.mkdir()
    rng = np.random.default_rng(noise)
    for place, prompt in enumerate(PROMPTS):
        for seed in SEEDS:
            shown = prompt if rng.random() < right else PROMPTS[place - 1]
            chunk = PngInfo()
            if record:
                chunk.add_text("diffusion-align", json.dumps({"prompt": prompt, "seed": seed}))
            picture = Image.fromarray(np.asarray(render(sample_scene(parse_prompt(shown), rng))))
            picture.save(folder / f"{place:02d}-{seed}.png", pnginfo=chunk)
    return folder
