"""Judged pairs for training scorers: ``python -m diffusion_align.scenes.make_comparisons KIND OUT``.

- ``renders``: rendered scenes. Most pairs are a scene of the prompt against one of a near miss (one word changed); some
  are a scene against a blurred, noisy or stained copy; some are two scenes of one prompt, judged by a simulated user.
- ``judged``: pictures of a model, several for each prompt, every pair judged by a simulated user. Those of an
  inpainting model are repaintings of one hole in a rendered scene.
- ``imperfect``: the same of rendered scenes with a model's mistakes (see ``imperfect.py``).
- ``edits``: a rendered scene, an instruction and two attempts at it (see ``edits.py``).

All have Pick-a-Pic's columns and ``label_0_ASPECT``; the verdicts on the oracle's aspects are Bradley-Terry draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_align.adapters import load_adapter
from diffusion_align.data.inpainting import load_holes
from diffusion_align.precision import fast_autocast
from diffusion_align.sampling.sampler import generate, to_uint8

from .edits import damaged, edit_rows
from .grammar import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    FORBIDDEN_ON,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    PromptSpec,
    Scene,
    parse_prompt,
    position_holds,
    relation_holds,
    sample_prompt,
    sample_scene,
)
from .holes import SceneHoles
from .imperfect import imperfect_picture
from .make_pairs import (
    GUIDANCE_SCALES,
    POPULATIONS,
    TEMPERATURE,
    TIE_MARGIN,
    decode_jpeg,
    draw_split,
    encode_jpeg,
    judge,
    split_file,
    split_sizes,
    verdict,
)
from .oracle import OracleScore, score_detection, score_image
from .render import IMAGE_SIZE, render
from .vision import detect

ASPECTS = ("prompt_following", "aesthetic", "fidelity")
#: An aspect decides as sharply as its weight in the balanced user's taste lets it.
ASPECT_TEMPERATURE = 3 * TEMPERATURE
#: Kinds of holes in repainted pictures.
HOLES = ("box", "brush", "half")


def near_miss_scene(spec: PromptSpec, rng: np.random.Generator) -> Scene:
    """A scene of a near miss of ``spec`` that does not satisfy ``spec`` by accident."""
    while True:
        changed = near_miss(spec, rng)
        scene = sample_scene(changed, rng)
        if changed.relation == spec.relation and changed.position == spec.position:
            return scene
        centers = [
            (obj.x, obj.y) for obj in scene.objects
        ]  # left of and above, on the left and at the top are no rivals
        if spec.relation is not None and not relation_holds(spec.relation, centers[0], centers[1]):
            return scene
        if spec.position is not None and not position_holds(spec.position, centers[0]):
            return scene


def near_miss(spec: PromptSpec, rng: np.random.Generator) -> PromptSpec:
    """``spec`` with one thing changed."""
    while True:
        objects, changed = list(spec.objects), spec
        i = int(rng.integers(len(objects)))
        kind = rng.integers(5)
        if kind == 0:
            wanted = replace(objects[i], color=str(rng.choice(COLORS)))
        elif kind == 1:
            wanted = replace(objects[i], shape=str(rng.choice(SHAPES)))
        elif kind == 2 and objects[i].size is not None:
            wanted = replace(objects[i], size=next(size for size in SIZES if size != objects[i].size))
        else:
            wanted = objects[i]
        if kind <= 2:
            objects = [wanted] * len(objects) if spec.counted else [*objects[:i], wanted, *objects[i + 1 :]]
            changed = replace(spec, objects=tuple(objects))
        elif kind == 3:
            changed = replace(spec, background=str(rng.choice(BACKGROUNDS)))
        elif spec.counted:
            changed = replace(spec, objects=(objects[0],) * int(rng.choice(list(COUNTS.values()))))
        elif spec.relation is not None:
            changed = replace(spec, relation=str(rng.choice(RELATIONS)))
        elif spec.position is not None:
            changed = replace(spec, position=str(rng.choice(POSITIONS)))
        distinct = spec.counted or len({(o.shape, o.color) for o in changed.objects}) == len(changed.objects)
        unseen = any(o.color in FORBIDDEN_ON.get(changed.background, ()) for o in changed.objects)
        if changed != spec and distinct and not unseen and not changed.held_out():
            return changed


def preference_probability(first: OracleScore, second: OracleScore, population: str = "similar") -> tuple[float, float]:
    """P(first preferred) and P(tie) over all simulated users: what a perfect judge who cannot see the user knows."""
    users = list(POPULATIONS[population].values())
    gaps = np.array([user.utility(first) - user.utility(second) for user in users])
    shares, ties = np.array([user.share for user in users]), np.abs(gaps) < TIE_MARGIN
    wins = np.where(ties, 0.0, 1 / (1 + np.exp(-gaps / TEMPERATURE)))
    return float((shares * wins).sum()), float((shares * ties).sum())


def judged_row(
    files: Sequence[bytes],
    prompt: str,
    scores: tuple[OracleScore, OracleScore],
    rng: np.random.Generator,
    key: str,
    population: str = "similar",
) -> dict[str, Any]:
    """A random user's verdict on the whole, and on each aspect; ``bayes_0`` is the best prediction of the former."""
    first, second = scores
    judgement = judge(first, second, rng, population)
    win, tie = preference_probability(first, second, population)
    aspects = {
        f"label_0_{name}": verdict(getattr(first, name) - getattr(second, name), ASPECT_TEMPERATURE, rng)
        for name in ASPECTS
    }
    return {
        **row(files, prompt, judgement.label_0, key),
        "user_id": judgement.user,
        **aspects,
        "bayes_0": win / max(1 - tie, 1e-9),
    }


def row(files: Sequence[bytes], prompt: str, label: float, key: str) -> dict[str, Any]:
    """Pick-a-Pic's columns that matter to a scorer."""
    return {
        "jpg_0": files[0], "jpg_1": files[1], "caption": prompt, "label_0": label, "label_1": 1 - label,
        "has_label": True, "ranking_id": key, "user_id": "", "num_example_per_prompt": 1,
        **{f"label_0_{name}": None for name in ASPECTS}, "bayes_0": None,
    }  # fmt: skip


def rendered_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` pairs of rendered scenes."""
    rows = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        spec = sample_prompt(rng)
        right = render(sample_scene(spec, rng))
        kind = rng.random()
        if kind < 0.65:
            other, aspect = render(near_miss_scene(spec, rng)), "prompt_following"
        elif kind < 0.8:
            other, aspect = damaged(right, rng), "fidelity"
        else:
            other, aspect = render(sample_scene(spec, rng)), ""
        files = [encode_jpeg(right), encode_jpeg(other)]
        if aspect:
            rows.append({**row(files, spec.text(), 1.0, f"render {i}"), f"label_0_{aspect}": 1.0})
        else:
            scores = score_image(right, spec.text()), score_image(other, spec.text())
            rows.append(judged_row(files, spec.text(), scores, rng, f"render {i}"))
    return rows


def judged_rows(
    prompts: Sequence[str], model: str, per_prompt: int, seed: int, steps: int, rejudged: int = 0
) -> list[dict[str, Any]]:
    """Every pair of ``per_prompt`` pictures that ``model`` draws for each prompt, at scales drawn per picture.

    The users also judge ``rejudged`` pairs of each prompt's pictures for other prompts, near misses of their own: more
    verdicts on prompt-following from the same pictures.
    """
    rng = np.random.default_rng(seed)
    adapter = load_adapter(model)
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    # A repainted picture needs little guidance: most of it is given.
    choices = (1.0, *GUIDANCE_SCALES[:-1]) if adapter.is_inpainting else GUIDANCE_SCALES
    scales = rng.choice(choices, size=len(repeated))
    images = np.empty((len(repeated), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    with fast_autocast("cpu"):
        for scale in choices:
            rows, holes = np.flatnonzero(scales == scale), None
            seeds = [seed * 1_000_003 + int(i) for i in rows]
            if adapter.is_inpainting:
                source, tasks = SceneHoles(len(prompts), seed, list(prompts)), (rows // per_prompt).tolist()
                holes = load_holes(source, tasks, [seed * 1_000_003 + task for task in tasks], IMAGE_SIZE, HOLES)
            drawn = generate(
                adapter,
                [repeated[i] for i in rows],
                num_inference_steps=steps,
                guidance_scale=float(scale),
                seeds=seeds,
                batch_size=64,
                inpaint=None if holes is None else holes.encode(adapter).cpu(),
            )
            images[rows] = to_uint8(drawn if holes is None else holes.composite(drawn))
    return judged_pictures(prompts, images, per_prompt, rejudged, rng)


def judged_pictures(
    prompts: Sequence[str], images: NDArray[np.uint8], per_prompt: int, rejudged: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Every pair of each prompt's ``per_prompt`` pictures (of ``images`` (N, 64, 64, 3)), and rejudged ones."""
    files = [encode_jpeg(image) for image in images]
    seen = [detect(decode_jpeg(file)) for file in files]
    found = []
    for p, prompt in enumerate(prompts):
        own = range(p * per_prompt, (p + 1) * per_prompt)
        scores = {i: score_detection(seen[i], prompt) for i in own}
        for a, b in combinations(own, 2):
            if rng.random() < 0.5:
                a, b = b, a
            found.append(judged_row((files[a], files[b]), prompt, (scores[a], scores[b]), rng, f"{p}"))
        spec = parse_prompt(prompt)
        for _ in range(rejudged):
            other = near_miss(spec, rng).text()
            a, b = rng.choice(per_prompt, 2, replace=False) + p * per_prompt
            pair = score_detection(seen[a], other), score_detection(seen[b], other)
            found.append(judged_row((files[a], files[b]), other, pair, rng, f"{p}"))
    return found


def imperfect_rows(prompts: Sequence[str], per_prompt: int, seed: int, rejudged: int = 0) -> list[dict[str, Any]]:
    """Like ``judged_rows``, of rendered pictures with a model's mistakes: no denoiser has to draw them."""
    rng = np.random.default_rng(seed)
    images = []
    for prompt in prompts:
        spec = parse_prompt(prompt)
        images += [imperfect_picture(spec, near_miss(spec, rng), rng) for _ in range(per_prompt)]
    return judged_pictures(prompts, np.stack(images), per_prompt, rejudged, rng)


def rejudged_rows(pairs: Iterable[Mapping[str, Any]], population: str, seed: int) -> list[dict[str, Any]]:
    """The pictures and prompts of judged ``pairs``, with verdicts of another population."""
    rng = np.random.default_rng(seed)
    seen = cache(lambda file: detect(decode_jpeg(file)))
    rows = []
    for pair in pairs:
        files, prompt = (pair["jpg_0"], pair["jpg_1"]), pair["caption"]
        scores = score_detection(seen(files[0]), prompt), score_detection(seen(files[1]), prompt)
        rows.append(judged_row(files, prompt, scores, rng, pair["ranking_id"], population))
    return rows


def main() -> None:
    from datasets import Dataset

    parser = argparse.ArgumentParser(prog="python -m diffusion_align.scenes.make_comparisons", description=__doc__)
    parser.add_argument("kind", choices=("renders", "judged", "imperfect", "edits"))
    parser.add_argument("out", type=Path, help="folder for train/validation/test parquet files")
    parser.add_argument("--train", type=int, default=1500, help="pairs (renders, edits, --pictures) or prompts")
    parser.add_argument("--held-out", type=int, default=250, help="the same of validation and test, each")
    parser.add_argument("--model", default="scenes-sdxl", help="model that draws the judged pictures")
    parser.add_argument("--per-prompt", type=int, default=4, help="judged pictures per prompt")
    parser.add_argument(
        "--rejudged", type=int, default=0, help="training pairs per prompt judged for near misses of it"
    )
    parser.add_argument("--steps", type=int, default=10, help="sampling steps of the judged pictures")
    parser.add_argument("--pictures", type=Path, help="take pictures and prompts from this judged folder (judged)")
    parser.add_argument("--population", choices=tuple(POPULATIONS), default="similar", help="who judges --pictures")
    parser.add_argument("--seed", type=int, default=31)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, count, seed in split_sizes(args.train, args.held_out, args.seed):
        if args.kind == "renders":
            rows = rendered_rows(count, seed)
        elif args.kind == "edits":
            rows = edit_rows(count, seed)
        elif args.pictures is not None:
            table = Dataset.from_parquet(str(split_file(args.pictures, split)))
            rows = rejudged_rows(table.select(range(min(count, len(table)))), args.population, seed)
        else:
            prompts = draw_split(split, count, seed, seen)
            rejudged = args.rejudged if split == "train" else 0
            if args.kind == "imperfect":
                rows = imperfect_rows(prompts, args.per_prompt, seed, rejudged)
            else:
                rows = judged_rows(prompts, args.model, args.per_prompt, seed, args.steps, rejudged)
        Dataset.from_list(rows).to_parquet(split_file(args.out, split))
        print(f"{split}: {len(rows)} pairs", flush=True)


if __name__ == "__main__":
    main()
