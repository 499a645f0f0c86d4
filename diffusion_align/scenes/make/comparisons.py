"""Judged pairs for training scorers: ``python -m diffusion_align.scenes.make.comparisons KIND OUT``.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_align.adapters import load_adapter
from diffusion_align.data.holes import load_holes
from diffusion_align.devices import fast_autocast
from diffusion_align.guidance.schedules import TableGuidance
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import generate, sample, to_uint8
from diffusion_align.scenes.held_out import fresh_prompts
from diffusion_align.scenes.world.grammar import RELATIONS, parse_prompt, sample_prompt, sample_scene
from diffusion_align.scenes.world.imperfect import blemished, imperfect_picture
from diffusion_align.scenes.world.marks import marked_words
from diffusion_align.scenes.world.oracle import OracleScore, score_detection, score_image
from diffusion_align.scenes.world.questions import PLAIN, Questions, mirrored_prompt, near_miss, near_miss_scene
from diffusion_align.scenes.world.render import IMAGE_SIZE, render
from diffusion_align.scenes.world.scene_holes import SceneHoles
from diffusion_align.scenes.world.vision import Detection, detect

from .edits import damaged, edit_rows
from .pairs import (
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

ASPECTS = ("prompt_following", "aesthetic", "fidelity")
#: An aspect decides as sharply as its weight in the balanced user's taste lets it.
ASPECT_TEMPERATURE = 3 * TEMPERATURE
#: Kinds of holes in repainted pictures.
HOLES = ("box", "brush", "half")


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
    votes: int = 1,
    marks: bool = False,
) -> dict[str, Any]:
    """A random user's verdict on the whole, and on each aspect; ``bayes_0`` is the best prediction of the former.

    Of several ``votes`` the labels are the mean, and no user is named. ``marks``: the users mark wrong words, too.
    """
    first, second = scores
    judgements = [judge(first, second, rng, population) for _ in range(votes)]
    win, tie = preference_probability(first, second, population)
    aspects = {
        f"label_0_{name}": verdict(getattr(first, name) - getattr(second, name), ASPECT_TEMPERATURE, rng, votes)
        for name in ASPECTS
    }
    return {
        **row(files, prompt, float(np.mean([judgement.label_0 for judgement in judgements])), key),
        "user_id": judgements[0].user if votes == 1 else "",
        **aspects,
        "bayes_0": win / max(1 - tie, 1e-9),
        **({f"wrong_words_{i}": marked_words(prompt, scores[i].facts, rng, votes) for i in (0, 1)} if marks else {}),
    }


def row(files: Sequence[bytes], prompt: str, label: float, key: str) -> dict[str, Any]:
    """Pick-a-Pic's columns that matter to a scorer."""
    return {
        "jpg_0": files[0], "jpg_1": files[1], "caption": prompt, "label_0": label, "label_1": 1 - label,
        "has_label": True, "ranking_id": key, "user_id": "", "num_example_per_prompt": 1,
        "scale_0": None, "scale_1": None,
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
    prompts: Sequence[str],
    model: str,
    per_prompt: int,
    seed: int,
    steps: int,
    questions: Questions = PLAIN,
    schedules: bool = False,
    choices: Sequence[float] = (),
) -> list[dict[str, Any]]:
    """Every pair of ``per_prompt`` pictures that ``model`` draws for each prompt, at scales drawn per picture.

    Args:
        schedules: the scale of each picture changes once, at a random step (``changing_scales``).
        choices: the scales; none: ``GUIDANCE_SCALES``, or lower ones for repaintings.
    """
    rng = np.random.default_rng(seed)
    adapter = load_adapter(model)
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    if schedules:
        if choices or adapter.is_inpainting:
            raise ValueError("--schedules draws its own scales, of models that do not inpaint: leave out --scales")
        with fast_autocast("cpu"):
            samples = sample(
                adapter,
                repeated,
                num_inference_steps=steps,
                guidance=TableGuidance(changing_scales(len(repeated), steps, seed).tolist()),
                seeds=[seed * 1_000_003 + i for i in range(len(repeated))],
                options=SamplingOptions(batch_size=64),
            )
        return judged_pictures(prompts, to_uint8(samples.images), per_prompt, rng, questions)
    # A repainted picture needs little guidance: most of it is given.
    choices = tuple(choices or ((1.0, *GUIDANCE_SCALES[:-1]) if adapter.is_inpainting else GUIDANCE_SCALES))
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
    return judged_pictures(prompts, images, per_prompt, rng, questions, scales.tolist())


def changing_scales(count: int, steps: int, seed: int) -> NDArray[np.float64]:
    """(steps, count): one scale up to a random step and another from there on, each log-uniform in 1.25 to 10."""
    table = np.empty((steps, count))
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        first, second = np.exp(rng.uniform(np.log(1.25), np.log(10), 2))
        change = int(rng.integers(steps))
        table[:change, i], table[change:, i] = first, second
    return table


def cached_scores(seen: Sequence[Detection]) -> Callable[[int, str], OracleScore]:
    """The score of a picture, by number, for a prompt; several pairs ask for the same."""
    return cache(lambda number, prompt: score_detection(seen[number], prompt))


def judged_pictures(
    prompts: Sequence[str],
    images: NDArray[np.uint8],
    per_prompt: int,
    rng: np.random.Generator,
    questions: Questions = PLAIN,
    scales: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Every pair of each prompt's ``per_prompt`` pictures (of ``images`` (N, 64, 64, 3)), and what else is asked.

    Args:
        scales: of the pictures (N); they are told for the pictures' own prompts.
    """
    found = []
    for p, prompt in enumerate(prompts):
        first = p * per_prompt
        shown = images[first : first + per_prompt]
        if questions.mirrored and rng.random() < 0.5:
            prompt, shown = mirrored_prompt(prompt), shown[:, :, ::-1]
        files = [encode_jpeg(image) for image in shown]
        score = cached_scores([detect(decode_jpeg(file)) for file in files])
        for text, a, b in questions.asked(prompt, per_prompt, rng):
            scores = score(a, text), score(b, text)
            shown_pair = files[a], files[b]
            judged = judged_row(shown_pair, text, scores, rng, f"{p}", votes=questions.votes, marks=questions.marks)
            if scales is not None and text == prompt:
                judged |= {"scale_0": float(scales[first + a]), "scale_1": float(scales[first + b])}
            found.append(judged)
    return found


def imperfect_rows(
    prompts: Sequence[str], per_prompt: int, seed: int, questions: Questions = PLAIN
) -> list[dict[str, Any]]:
    """Like ``judged_rows``, of rendered pictures with a model's mistakes: no denoiser has to draw them.

    If it is relations that are asked about, the objects are right, and any relation is shown.
    """
    rng = np.random.default_rng(seed)
    images = []
    for prompt in prompts:
        spec = parse_prompt(prompt)
        for _ in range(per_prompt):
            if questions.relations:
                shown = replace(spec, relation=str(rng.choice(RELATIONS)))
                images.append(blemished(render(sample_scene(shown, rng)), rng))
            else:
                images.append(imperfect_picture(spec, near_miss(spec, rng), rng))
    return judged_pictures(prompts, np.stack(images), per_prompt, rng, questions)


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


def main(argv: Sequence[str] | None = None) -> None:
    from datasets import Dataset

    parser = argparse.ArgumentParser(prog="python -m diffusion_align.scenes.make.comparisons", description=__doc__)
    parser.add_argument("kind", choices=("renders", "judged", "imperfect", "edits"))
    parser.add_argument("out", type=Path, help="folder for train/validation/test parquet files")
    parser.add_argument("--train", type=int, default=1500, help="pairs (renders, edits, --pictures) or prompts")
    parser.add_argument(
        "--held-out", type=int, default=250, help="the same of validation and test, each; 0: only train"
    )
    parser.add_argument("--model", default="scenes-sdxl", help="model that draws the judged pictures")
    parser.add_argument("--per-prompt", type=int, default=4, help="judged pictures per prompt")
    parser.add_argument(
        "--rejudged", type=int, default=0, help="training pairs per prompt judged for near misses of it"
    )
    parser.add_argument("--near-misses", type=int, default=0, help="the same, for this many near misses, all pairs")
    parser.add_argument("--votes", type=int, default=1, help="users asked about each training pair")
    parser.add_argument("--mirrored", action="store_true", help="mirror half of the training prompts and pictures")
    parser.add_argument("--marks", action="store_true", help="users also mark the words that pictures do not show")
    parser.add_argument(
        "--relations", action="store_true", help="only prompts that ask for a relation, and other relations (imperfect)"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=(), help="guidance scales to draw from (judged)")
    parser.add_argument("--schedules", action="store_true", help="change each training picture's scale on the way")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps of the judged pictures")
    parser.add_argument("--pictures", type=Path, help="take pictures and prompts from this judged folder (judged)")
    parser.add_argument("--population", choices=tuple(POPULATIONS), default="similar", help="who judges --pictures")
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--spare-fresh", action="store_true", help="no prompts that 'evaluate guidance' tests on")
    parser.add_argument("--spare", type=Path, help="no prompts of this folder's validation and test")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    seen = set().union(*fresh_prompts(500, 250)) if args.spare_fresh else set()
    if args.spare is not None:
        for split in ("validation", "test"):
            seen |= set(Dataset.from_parquet(str(split_file(args.spare, split)))["caption"])
    for split, count, seed in split_sizes(args.train, args.held_out, args.seed):
        if count == 0:
            continue
        if args.kind == "renders":
            rows = rendered_rows(count, seed)
        elif args.kind == "edits":
            rows = edit_rows(count, seed)
        elif args.pictures is not None:
            table = Dataset.from_parquet(str(split_file(args.pictures, split)))
            rows = rejudged_rows(table.select(range(min(count, len(table)))), args.population, seed)
        else:
            prompts = draw_split(split, count, seed, seen)
            if args.relations:
                prompts = [prompt for prompt in prompts if parse_prompt(prompt).relation]
            asked = Questions(args.rejudged, args.near_misses, args.votes, args.mirrored, args.marks, args.relations)
            # The verdicts on test pairs do not depend on what else is asked.
            questions = (
                asked
                if split == "train"
                else Questions(marks=args.marks and split == "validation", relations=args.relations)
            )
            if args.kind == "imperfect":
                rows = imperfect_rows(prompts, args.per_prompt, seed, questions)
            else:
                schedules = args.schedules and split == "train"
                rows = judged_rows(
                    prompts, args.model, args.per_prompt, seed, args.steps, questions, schedules, args.scales
                )
        Dataset.from_list(rows).to_parquet(split_file(args.out, split))
        print(f"{split}: {len(rows)} pairs", flush=True)


if __name__ == "__main__":
    main()
