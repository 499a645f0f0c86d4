"""Edits of scenes: a source picture, an instruction, and attempts at it that follow it or not, cleanly or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from diffusion_align.scenes.world.grammar import BACKGROUNDS, COLORS, FORBIDDEN_ON, Scene, sample_prompt, sample_scene
from diffusion_align.scenes.world.render import IMAGE_SIZE, render

from .pairs import encode_jpeg

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Edit:
    """An instruction such as "make the ring green", "remove the star", "make the background dark".

    Attributes:
        right: the scene that follows it and changes nothing else.
        wrong: a scene that does not follow it: something else was done, too much, or nothing.
    """

    source: Scene
    instruction: str
    right: Scene
    wrong: Scene


def sample_edit(rng: np.random.Generator) -> Edit:
    """Draw a scene whose objects differ in shape, an instruction for it, and a right and a wrong result."""
    while True:
        spec = sample_prompt(rng)
        shapes = [wanted.shape for wanted in spec.objects]
        if len(shapes) < 2 or len(set(shapes)) < len(shapes):
            continue
        source = sample_scene(spec, rng)
        i, j = (int(k) for k in rng.choice(len(shapes), 2, replace=False))
        kind = int(rng.integers(3))
        if kind == 0:
            color, other = (str(c) for c in rng.choice(COLORS, 2, replace=False))
            if color == source.objects[i].color or color in FORBIDDEN_ON.get(source.background, ()):
                continue
            right = recolored(source, i, color)
            mistakes = [source, recolored(source, j, color), recolored(right, j, color), recolored(source, i, other)]
            instruction = f"make the {shapes[i]} {color}"
        elif kind == 1:
            right = removed(source, i)
            mistakes = [source, removed(source, j), recolored(source, i, str(rng.choice(COLORS)))]
            instruction = f"remove the {shapes[i]}"
        else:
            background, other = (str(b) for b in rng.choice(BACKGROUNDS, 2, replace=False))
            if background == source.background or any(
                o.color in FORBIDDEN_ON.get(background, ()) for o in source.objects
            ):
                continue
            right = replace(source, background=background)
            mistakes = [source, removed(right, j), replace(source, background=other), recolored(source, i, "purple")]
            instruction = f"make the background {background}"
        wrong = mistakes[int(rng.integers(len(mistakes)))]
        if wrong != right and not any(o.color in FORBIDDEN_ON.get(wrong.background, ()) for o in wrong.objects):
            return Edit(source, instruction, right, wrong)


def recolored(scene: Scene, index: int, color: str) -> Scene:
    """``scene`` with another colour of one object."""
    objects = list(scene.objects)
    objects[index] = replace(objects[index], color=color)
    return replace(scene, objects=tuple(objects))


def removed(scene: Scene, index: int) -> Scene:
    """``scene`` without one object."""
    return replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])


def damaged(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture blurred, noisy or stained."""
    kind = rng.integers(3)
    if kind == 0:
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.7, 1.6))))
        return np.asarray(blurred)
    if kind == 1:
        noise = rng.normal(0, float(rng.uniform(6, 25)), image.shape)
        return np.clip(image + noise, 0, 255).astype(np.uint8)
    stained = image.copy()
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    for _ in range(int(rng.integers(1, 4))):
        center = rng.uniform(0, IMAGE_SIZE, 2)
        spot = np.hypot(x - center[0], y - center[1]) < rng.uniform(1.2, 3.2)
        stained[spot] = rng.integers(0, 256, 3)
    return stained


def edit_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Judged pairs of attempts, with ``source`` and the instruction as caption.

    Four kinds: right against wrong (both clean or both damaged), right against right but damaged, wrong but clean
    against right but damaged (a tie whose aspects pull in opposite directions), and right clean against wrong damaged.
    """
    rows = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        edit = sample_edit(rng)
        right, wrong = render(edit.right), render(edit.wrong)
        kind = rng.random()
        if kind < 0.5:
            hurt = rng.random() < 0.2
            pair, labels = ((damaged(right, rng), damaged(wrong, rng)) if hurt else (right, wrong)), (1.0, 1.0, 0.5)
        elif kind < 0.7:
            pair, labels = (right, damaged(right, rng)), (1.0, 0.5, 1.0)
        elif kind < 0.85:
            pair, labels = (wrong, damaged(right, rng)), (0.5, 0.0, 1.0)
        else:
            pair, labels = (right, damaged(wrong, rng)), (1.0, 1.0, 1.0)
        if rng.random() < 0.5:
            pair, labels = (pair[1], pair[0]), (1 - labels[0], 1 - labels[1], 1 - labels[2])
        overall, following, quality = labels
        rows.append({
            "jpg_0": encode_jpeg(pair[0]), "jpg_1": encode_jpeg(pair[1]), "source": encode_jpeg(render(edit.source)),
            "caption": edit.instruction, "label_0": overall, "label_1": 1 - overall, "has_label": True,
            "label_0_instruction_following": following, "label_0_visual_quality": quality,
        })  # fmt: skip
    return rows
