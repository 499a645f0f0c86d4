"""Oracle scores of a shipped pipeline per guidance scale, on prompts it was not trained on, and a grid of pictures.

An inpainting model repaints random holes in rendered scenes of those prompts; what lies outside the hole is put back.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.data.masks import sample_mask
from diffusion_align.devices import fast_autocast
from diffusion_align.evaluation import image_grid
from diffusion_align.rewards import load_scorer
from diffusion_align.sampling.sampler import generate, to_uint8
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.scenes.world.grammar import parse_prompt, sample_scene
from diffusion_align.scenes.world.render import IMAGE_SIZE, render

from ..harness import write_result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks base-quality", description=__doc__)
    parser.add_argument("--model", default="scenes-sdxl")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.5, 5.0, 7.0])
    parser.add_argument("--prompts", type=int, default=250)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1234, help="of the first image; image i has seed + i")
    parser.add_argument("--grid", type=Path, default=None, help="PNG of the first prompts at every scale")
    parser.add_argument("--rows", type=int, default=8, help="prompts in the grid")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    adapter, scorer, prompts = load_adapter(args.model), load_scorer("scenes-oracle"), held_out_prompts(args.prompts)
    scenes, masks = holes(prompts, args.seed) if adapter.is_inpainting else (None, None)
    rows: list[dict[str, Any]] = []
    columns = {} if scenes is None or masks is None else {"with hole": scenes * (masks < 0.5)}
    for scale in args.scales:
        images = draw(adapter, prompts, scale, args.steps, args.seed, scenes, masks)
        columns[f"guidance {scale:g}"] = images[: args.rows]
        rows.append({"guidance_scale": scale, **mean_scores(scorer.score(images, prompts))})
    result = {"model": args.model, "prompts": len(prompts), "steps": args.steps, "seed": args.seed, "rows": rows}
    if scenes is not None and masks is not None:
        result["scenes_with_hole"] = mean_scores(scorer.score(scenes * (masks < 0.5), prompts))
        result["scenes_as_rendered"] = mean_scores(scorer.score(scenes, prompts))
    if args.grid is not None:
        pictures = [to_uint8(images[: args.rows]) for images in columns.values()]
        grid = image_grid([list(row) for row in zip(*pictures, strict=True)], prompts[: args.rows], list(columns), 2)
        grid.save(args.grid)
    write_result(f"base_quality_{args.model.replace('-', '_')}", result, args.out)


@torch.no_grad()
def draw(
    adapter: Adapter,
    prompts: list[str],
    scale: float,
    steps: int,
    seed: int,
    scenes: Tensor | None,
    masks: Tensor | None,
) -> Tensor:
    """One image per prompt (N, 3, H, W) in [0, 1]; outside ``masks`` those of ``scenes``."""
    with fast_autocast(adapter.device):
        inpaint = None
        if scenes is not None and masks is not None:
            pairs = zip(scenes.split(64), masks.split(64), strict=True)
            inpaint = torch.cat([adapter.encode_inpaint(s * 2 - 1, m) for s, m in pairs]).float()
        images = generate(
            adapter,
            prompts,
            num_inference_steps=steps,
            guidance_scale=scale,
            seeds=[seed + i for i in range(len(prompts))],
            batch_size=64,
            inpaint=inpaint,
        )
    return images if scenes is None or masks is None else torch.where(masks > 0.5, images, scenes)


def holes(prompts: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """A rendered scene of every prompt (N, 3, H, W) in [0, 1] and a random mask (N, 1, H, W) for each."""
    scenes, masks = [], []
    for i, prompt in enumerate(prompts):
        rng = np.random.default_rng([seed, i])
        scenes.append(render(sample_scene(parse_prompt(prompt), rng)))
        masks.append(sample_mask(rng, IMAGE_SIZE, IMAGE_SIZE))
    pixels = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.from_numpy(np.stack(masks)).unsqueeze(1).float()


def mean_scores(reward: Any) -> dict[str, Any]:
    """Mean and standard error of the overall score and every aspect."""
    values = {"overall": reward.reward, **reward.aspects}
    return {
        name: {"mean": float(scores.mean()), "standard_error": float(scores.std() / len(scores) ** 0.5)}
        for name, scores in values.items()
    }
