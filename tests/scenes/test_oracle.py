"""The oracle on rendered scenes, whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from diffusion_align.scenes.world.grammar import (
    COLORS,
    SHAPES,
    PromptSpec,
    Scene,
    SceneObject,
    sample_prompt,
    sample_scene,
)
from diffusion_align.scenes.world.oracle import OracleScore, check_facts, score_image, score_images
from diffusion_align.scenes.world.render import COLOR_RGB, object_mask, render
from diffusion_align.scenes.world.vision import detect

Image = NDArray[np.uint8]
COUNT = 400


@pytest.fixture(scope="module")
def world() -> tuple[list[PromptSpec], list[Image], list[OracleScore]]:
    rng = np.random.default_rng(0)
    specs = [sample_prompt(rng, held_out=i % 4 == 0) for i in range(COUNT)]
    images = [render(sample_scene(spec, rng)) for spec in specs]
    return specs, images, score_images(np.stack(images), [spec.text() for spec in specs])


def degraded(image: Image, blur: float, noise: float, rng: np.random.Generator) -> Image:
    blurred = ndimage.gaussian_filter(image.astype(float), (blur, blur, 0))
    return np.clip(np.rint(blurred + rng.normal(0, noise, image.shape)), 0, 255).astype(np.uint8)


def test_at_least_98_percent_of_rendered_scenes_are_right(world) -> None:  # type: ignore[no-untyped-def]
    assert np.mean([score.correct for score in world[2]]) >= 0.98


@pytest.mark.slow
def test_at_most_2_percent_of_other_prompts_scenes_are_accepted(world) -> None:  # type: ignore[no-untyped-def]
    specs, images, _ = world
    others = [(specs[i], images[(i + 37) % COUNT]) for i in range(COUNT) if specs[i] != specs[(i + 37) % COUNT]]
    assert np.mean([score_image(image, spec.text()).correct for spec, image in others]) <= 0.02


def test_one_wrong_shape_or_color_is_never_accepted(world) -> None:  # type: ignore[no-untyped-def]
    specs, images, _ = world
    for spec, image in list(zip(specs, images, strict=True))[:100]:
        seen, (first, *rest) = detect(image), spec.objects
        wrong = [replace(first, shape=shape) for shape in SHAPES if shape != first.shape]
        wrong += [replace(first, color=color) for color in COLORS if color != first.color]
        accepted = [w for w in wrong if all(check_facts(replace(spec, objects=(w, *rest)), seen).values())]
        assert accepted == [], spec.text()


@pytest.mark.slow
def test_a_little_blur_and_noise_is_forgiven(world) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(1)
    pairs = list(zip(world[0], world[1], strict=True))[::2]
    right = [score_image(degraded(image, 0.7, 4, rng), spec.text()).correct for spec, image in pairs]
    assert np.mean(right) >= 0.93


@pytest.mark.slow
def test_fidelity_falls_with_blur_and_with_noise(world) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(2)

    def mean_fidelity(blur: float, noise: float) -> float:
        pairs = list(zip(world[0], world[1], strict=True))[:60]
        return float(np.mean([score_image(degraded(i, blur, noise, rng), s.text()).fidelity for s, i in pairs]))

    clean, blurred, melted = (mean_fidelity(blur, 0) for blur in (0, 0.8, 1.6))
    assert clean > 0.95
    assert clean - blurred > 0.05
    assert blurred - melted > 0.05
    assert clean - mean_fidelity(0, 12) > 0.1


@pytest.mark.slow
def test_pictures_of_one_prompt_differ_in_aesthetics(world) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(3)
    spreads = [
        np.std([score_image(render(sample_scene(spec, rng)), spec.text()).aesthetic for _ in range(8)])
        for spec in world[0][:16]
    ]
    assert np.mean(spreads) >= 0.1


def scene(*objects: SceneObject, background: str = "dark", tint: float = 0.6) -> Image:
    return render(Scene(objects, background, tint))


STAR = SceneObject("star", "red", "large", 0.3, 0.4, 0.19)
RING = SceneObject("ring", "blue", "small", 0.72, 0.45, 0.115)
PROMPT = "a large red star left of a small blue ring on a dark background"


@pytest.mark.parametrize(
    ("image", "wrong"),
    [
        (scene(STAR, RING), set()),
        (scene(STAR, RING, background="grey"), {"background"}),
        (scene(STAR, RING, SceneObject("circle", "green", "small", 0.5, 0.8, 0.11)), {"count"}),
        (scene(SceneObject("star", "red", "small", 0.3, 0.4, 0.115), RING), {"object 1 size"}),
        (scene(SceneObject("star", "red", "large", 0.7, 0.3, 0.19),
               SceneObject("ring", "blue", "small", 0.2, 0.4, 0.115)), {"relation"}),
        (scene(SceneObject("star", "green", "large", 0.3, 0.4, 0.19), RING), {"object 1 color", "relation"}),
        (scene(SceneObject("square", "red", "large", 0.3, 0.4, 0.19), RING), {"object 1 shape", "relation"}),
        (scene(STAR), {"object 2 shape", "object 2 color", "object 2 size", "relation", "count"}),
    ],
)  # fmt: skip
def test_each_wrong_fact_is_named(image: Image, wrong: set[str]) -> None:
    score = score_image(image, PROMPT)
    assert {name for name, holds in score.facts.items() if not holds} == wrong
    share = 1 - len(wrong) / len(score.facts)
    assert score.prompt_following == pytest.approx((share + (not wrong)) / 2)


def test_position_is_measured() -> None:
    image = scene(SceneObject("cross", "yellow", "small", 0.25, 0.5, 0.115))
    assert score_image(image, "a yellow cross on the left on a dark background").correct
    assert not score_image(image, "a yellow cross on the right on a dark background").facts["position"]


def test_a_flattering_tint_is_worth_more() -> None:
    complementary, same = 0.61 + 0.5, 0.61
    ring = SceneObject("ring", "blue", "large", 0.5, 0.5, 0.19)
    prompt = "a blue ring on a dark background"
    harmony = [score_image(scene(ring, tint=tint % 1), prompt).aesthetic for tint in (complementary, same)]
    assert harmony[0] - harmony[1] > 0.3


def test_an_empty_picture_scores_low() -> None:
    score = score_image(np.full((64, 64, 3), 30, np.uint8), PROMPT)
    assert score.aesthetic == 0
    assert [name for name, holds in score.facts.items() if holds] == ["background"]


def flat(level: int, grain: float = 0.0) -> Image:
    """STAR and RING on a background of one grey level."""
    image = np.random.default_rng(4).normal(level, grain, (64, 64, 3))
    for thing in (STAR, RING):
        image[object_mask(thing)] = np.array(COLOR_RGB[thing.color]) * 255
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def test_objects_are_found_on_pure_black() -> None:
    assert score_image(flat(0), PROMPT).correct


def test_grain_near_white_is_not_taken_for_white_objects() -> None:
    assert detect(flat(246, grain=3)).stray < 150


@pytest.mark.parametrize(
    ("image", "prompt", "message"),
    [
        (np.zeros((64, 64, 3), np.uint8), "a photo of a cat", "'a photo of a cat' is not a caption"),
        (np.zeros((32, 32, 3), np.uint8), PROMPT, r"found uint8 \(32, 32, 3\)"),
        (np.zeros((64, 64, 3), np.float32), PROMPT, "found float32"),
    ],
)
def test_bad_input_is_named(image: Image, prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_image(image, prompt)


def test_unequal_numbers_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        score_images(np.zeros((2, 64, 64, 3), np.uint8), [PROMPT])
