"""The ground truth of the scenes world: reads a prompt, measures a picture, says what is right and how it looks."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .grammar import PromptSpec, parse_prompt, position_holds, relation_holds
from .render import COLOR_RGB
from .vision import Detection, FoundObject, detect

#: Share of each aspect in ``OracleScore.overall``: their mean.
WEIGHTS: Mapping[str, float] = MappingProxyType({"prompt_following": 1 / 3, "aesthetic": 1 / 3, "fidelity": 1 / 3})

#: Hue (0..1) that flatters white objects, which have none of their own.
_COOL = 0.6
_MAX_CANDIDATES = 5


@dataclass(frozen=True)
class OracleScore:
    """Verdict on one picture; all numbers lie in [0, 1].

    Attributes:
        prompt_following: half the share of ``facts`` that hold, half whether all of them do: people forgive no
            wrong count or colour because the rest is right.
        aesthetic: half palette harmony, a quarter contrast, a quarter balance (see :func:`aesthetic`).
        fidelity: clean outlines, smooth background, no stray marks (see :func:`fidelity`).
        overall: their mean.
        correct: whether every fact holds.
        facts: what the prompt asks for, e.g. {"object 1 color": True, "relation": False, "count": True, ...}.
    """

    prompt_following: float
    aesthetic: float
    fidelity: float
    overall: float
    correct: bool
    facts: Mapping[str, bool]


def score_image(image: NDArray[np.uint8], prompt: str) -> OracleScore:
    """Score one picture, uint8 (64, 64, 3), made for ``prompt``.

    Raises:
        ValueError: a prompt outside the scenes grammar, or a picture of another shape or dtype.
    """
    return score_detection(detect(image), prompt)


def score_detection(seen: Detection, prompt: str) -> OracleScore:
    """Score what was found in a picture made for ``prompt``; one picture may be asked about many prompts.

    Raises:
        ValueError: a prompt outside the scenes grammar.
    """
    facts = check_facts(parse_prompt(prompt), seen)
    parts = {
        "prompt_following": (sum(facts.values()) / len(facts) + all(facts.values())) / 2,
        "aesthetic": aesthetic(seen),
        "fidelity": fidelity(seen),
    }
    overall = sum(WEIGHTS[name] * value for name, value in parts.items())
    return OracleScore(**parts, overall=overall, correct=all(facts.values()), facts=MappingProxyType(facts))


def score_images(images: NDArray[np.uint8], prompts: Sequence[str]) -> list[OracleScore]:
    """Score pictures (N, 64, 64, 3) for their prompts.

    Raises:
        ValueError: as ``score_image``, or unequal numbers.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    return [score_image(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def check_facts(spec: PromptSpec, seen: Detection) -> dict[str, bool]:
    """Whether each thing the prompt asks for is there, under the most favourable pairing of objects.

    A relation or position counts only for objects whose shape and colour are right.
    """
    found = seen.objects[:_MAX_CANDIDATES]
    slots: list[FoundObject | None] = [*found, *[None] * max(0, len(spec.objects) - len(found))]
    candidates = (_object_facts(spec, choice) for choice in permutations(slots, len(spec.objects)))
    facts = max(candidates, key=lambda each: sum(each.values()))
    facts["count"] = len(seen.objects) == len(spec.objects)
    facts["background"] = seen.background == spec.background
    return facts


def _object_facts(spec: PromptSpec, choice: Sequence[FoundObject | None]) -> dict[str, bool]:
    facts: dict[str, bool] = {}
    right: list[FoundObject | None] = []
    for i, (wanted, found) in enumerate(zip(spec.objects, choice, strict=True), start=1):
        facts[f"object {i} shape"] = found is not None and found.shape == wanted.shape
        facts[f"object {i} color"] = found is not None and found.color == wanted.color
        if wanted.size is not None:
            facts[f"object {i} size"] = found is not None and found.size == wanted.size
        right.append(found if facts[f"object {i} shape"] and facts[f"object {i} color"] else None)
    if spec.relation is not None:
        first, second = right
        facts["relation"] = (
            first is not None
            and second is not None
            and relation_holds(spec.relation, (first.x, first.y), (second.x, second.y))
        )
    if spec.position is not None:
        facts["position"] = right[0] is not None and position_holds(spec.position, (right[0].x, right[0].y))
    return facts


def aesthetic(seen: Detection) -> float:
    """0.5 harmony + 0.25 contrast + 0.25 balance, each in [0, 1]; 0 without objects.

    - harmony: (1 - cos d) / 2 for the angle d between the background's tint and an object's hue: highest for
      complementary hues; white objects like a cool tint. A colourless background counts 0.3.
    - contrast: colour distance between objects and background, 0.3 to 0.9 mapped to 0..1.
    - balance: the objects' centre of mass, 1 in the middle of the picture, 0 at a third of the side from it.
    """
    if not seen.objects:
        return 0.0
    areas = np.array([found.area for found in seen.objects])
    share = areas / areas.sum()
    mean = seen.background_rgb.mean(axis=0)
    tint, _, _ = colorsys.rgb_to_hls(*(float(v) for v in mean))
    vivid = min(1.0, float(mean.max() - mean.min()) / 0.03)
    harmonies, contrasts = [], []
    for found in seen.objects:
        color = COLOR_RGB[found.color]
        wanted = _COOL if found.color == "white" else colorsys.rgb_to_hls(*color)[0] + 0.5
        harmonies.append(vivid * (1 + np.cos(2 * np.pi * (tint - wanted))) / 2 + (1 - vivid) * 0.3)
        contrasts.append(np.clip((np.linalg.norm(np.array(color) - mean) - 0.3) / 0.6, 0, 1))
    x = float(np.dot(share, [found.x for found in seen.objects]))
    y = float(np.dot(share, [found.y for found in seen.objects]))
    balance = max(0.0, 1 - float(np.hypot(x - 0.5, y - 0.5)) / 0.33)
    return float(0.5 * np.dot(share, harmonies) + 0.25 * np.dot(share, contrasts) + 0.25 * balance)


def fidelity(seen: Detection) -> float:
    """0.4 outlines + 0.2 sharp edges + 0.25 smooth background + 0.15 no stray marks, each in [0, 1]."""
    smooth = _ramp(seen.roughness, worst=0.05, best=0.008)
    clean = _ramp(seen.stray, worst=30, best=2)
    if not seen.objects:
        return 0.25 * smooth + 0.15 * clean
    outlines = float(np.mean([_ramp(found.iou, worst=0.6, best=0.9) for found in seen.objects]))
    sharp = float(np.mean([_ramp(found.softness, worst=3.0, best=1.3) for found in seen.objects]))
    return 0.4 * outlines + 0.2 * sharp + 0.25 * smooth + 0.15 * clean


def _ramp(value: float, worst: float, best: float) -> float:
    return float(np.clip((value - worst) / (best - worst), 0, 1))
