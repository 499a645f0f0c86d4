"""Rendered scenes with a hole to be repainted: the embedded world's inpainting tasks, as many as are asked for."""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffusion_align.data.inpainting import InpaintingExample
from diffusion_align.data.masks import Mask

from .grammar import Scene, parse_prompt, sample_prompt, sample_scene
from .render import IMAGE_SIZE, object_mask, render

#: Pictures in each.
SCENES = 20_000


def scene_object_mask(scene: Scene, index: int, grow: float = 1.3, size: int = IMAGE_SIZE) -> Mask:
    """Object ``index`` of a scene and a margin around it (``grow`` times its radius)."""
    obj = scene.objects[index]
    bigger = type(obj)(obj.shape, obj.color, obj.size, obj.x, obj.y, obj.radius * grow, obj.angle)
    return object_mask(bigger, size)


class SceneHoles:
    """Scenes of random prompts (or of given ones) without masks; with ``objects`` one object is to be repainted.

    Example i depends on ``seed`` and i alone. Random prompts leave out the compositions kept for tests.
    """

    def __init__(self, count: int, seed: int = 0, prompts: list[str] | None = None, objects: bool = False) -> None:
        self.count, self.seed, self.prompts, self.objects = count, seed, prompts, objects

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> InpaintingExample:
        rng = np.random.default_rng((self.seed, index))
        spec = sample_prompt(rng) if self.prompts is None else parse_prompt(self.prompts[index % len(self.prompts)])
        scene = sample_scene(spec, rng)
        mask = scene_object_mask(scene, int(rng.integers(len(scene.objects)))) if self.objects else None
        return InpaintingExample(spec.text(), Image.fromarray(render(scene)), mask)


def random_holes(split: str) -> SceneHoles:
    """Scenes with random masks: ``scenes-holes``."""
    return SceneHoles(SCENES, seed=0 if split == "train" else 1)


def object_holes(split: str) -> SceneHoles:
    """Scenes of which one object is to be repainted: ``scenes-objects``."""
    return SceneHoles(SCENES, seed=0 if split == "train" else 1, objects=True)
