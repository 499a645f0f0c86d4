"""The language of the embedded world: captions, what they mean, and scenes that satisfy them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
SIZES = ("small", "large")
BACKGROUNDS = ("dark", "grey", "light")
RELATIONS = ("left of", "right of", "above", "below")
POSITIONS = ("in the center", "on the left", "on the right", "at the top", "at the bottom")
COUNTS = {"two": 2, "three": 3}

#: Colour-shape pairs that never occur in training captions: they measure compositional generalisation.
HELD_OUT_COMPOSITIONS = frozenset(
    {("red", "ring"), ("orange", "cross"), ("yellow", "circle"), ("green", "star"), ("blue", "triangle"),
     ("purple", "square")}
)  # fmt: skip

#: Radius range of each size, in units of the image side.
RADII = {"small": (0.105, 0.125), "large": (0.175, 0.205)}

#: A white object on a light background could not be seen.
FORBIDDEN_ON = {"light": frozenset({"white"})}


@dataclass(frozen=True)
class ObjectSpec:
    """What a caption says of one object; ``size`` is None where it says nothing of it."""

    shape: str
    color: str
    size: str | None = None

    def text(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape) if word)


@dataclass(frozen=True)
class PromptSpec:
    """The meaning of a caption.

    One object may have a ``position``; two different ones have a ``relation`` (first to second);
    ``counted`` means that ``objects`` are 2 or 3 copies of one spec ("two small red rings").
    """

    objects: tuple[ObjectSpec, ...]
    background: str
    relation: str | None = None
    position: str | None = None
    counted: bool = False

    def text(self) -> str:
        """The caption; ``parse_prompt`` reads it back."""
        where = f"on a {self.background} background"
        if self.counted:
            number = {v: k for k, v in COUNTS.items()}[len(self.objects)]
            plural = self.objects[0].text() + ("es" if self.objects[0].shape == "cross" else "s")
            return f"{number} {plural} {where}"
        names = [_with_article(o.text()) for o in self.objects]
        if len(names) == 1:
            return " ".join(part for part in (names[0], self.position, where) if part)
        if len(names) == 2:
            return f"{names[0]} {self.relation} {names[1]} {where}"
        return f"{names[0]}, {names[1]} and {names[2]} {where}"

    def held_out(self) -> bool:
        """True if any colour-shape pair is reserved for testing."""
        return any((o.color, o.shape) in HELD_OUT_COMPOSITIONS for o in self.objects)


@dataclass(frozen=True)
class SceneObject:
    """An object as drawn: centre ``x, y`` and ``radius`` in units of the image side, ``angle`` in radians."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A drawable world. ``tint`` in [0, 1) is the hue of the background's slight colour cast."""

    objects: tuple[SceneObject, ...]
    background: str
    tint: float = 0.0


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


_OBJECT = rf"(?:an? )(?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_WHERE = rf"on a ({'|'.join(BACKGROUNDS)}) background"
_SINGLE = re.compile(rf"^{_OBJECT}(?: ({'|'.join(POSITIONS)}))? {_WHERE}$")
_PAIR = re.compile(rf"^{_OBJECT} ({'|'.join(RELATIONS)}) {_OBJECT} {_WHERE}$")
_TRIPLE = re.compile(rf"^{_OBJECT}, {_OBJECT} and {_OBJECT} {_WHERE}$")
_COUNT = re.compile(
    rf"^({'|'.join(COUNTS)}) (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?:es|s) {_WHERE}$"
)


def parse_prompt(text: str) -> PromptSpec:
    """Read a caption of the scenes grammar.

    Raises:
        ValueError: the text is outside the grammar; the message quotes it and shows an example.
    """
    text = text.strip().rstrip(".").lower()
    if m := _SINGLE.match(text):
        return PromptSpec((ObjectSpec(m[3], m[2], m[1]),), m[5], position=m[4])
    if m := _PAIR.match(text):
        first, second = ObjectSpec(m[3], m[2], m[1]), ObjectSpec(m[7], m[6], m[5])
        return PromptSpec((first, second), m[8], relation=m[4])
    if m := _TRIPLE.match(text):
        objects = tuple(ObjectSpec(m[i + 2], m[i + 1], m[i]) for i in (1, 4, 7))
        return PromptSpec(objects, m[10])
    if m := _COUNT.match(text):
        return PromptSpec((ObjectSpec(m[4], m[3], m[2]),) * COUNTS[m[1]], m[5], counted=True)
    raise ValueError(
        f"{text!r} is not a caption of the scenes world; expected something like "
        "'a large red star left of a small blue ring on a dark background'"
    )


def sample_prompt(rng: np.random.Generator, held_out: bool = False) -> PromptSpec:
    """Draw a prompt; ``held_out=True`` forces at least one reserved colour-shape pair, False forbids them."""
    while True:
        spec = _sample_any_prompt(rng)
        if spec.held_out() == held_out:
            return spec


def _sample_object(rng: np.random.Generator, background: str) -> ObjectSpec:
    colors = [c for c in COLORS if c not in FORBIDDEN_ON.get(background, ())]
    size = str(rng.choice(SIZES)) if rng.random() < 0.5 else None
    return ObjectSpec(str(rng.choice(SHAPES)), str(rng.choice(colors)), size)


def _sample_any_prompt(rng: np.random.Generator) -> PromptSpec:
    background = str(rng.choice(BACKGROUNDS))
    kind = rng.random()
    if kind < 0.30:
        position = str(rng.choice(POSITIONS)) if rng.random() < 0.5 else None
        return PromptSpec((_sample_object(rng, background),), background, position=position)
    if kind < 0.55:
        count = int(rng.choice(list(COUNTS.values())))
        return PromptSpec((_sample_object(rng, background),) * count, background, counted=True)
    count = 2 if kind < 0.85 else 3
    objects = tuple(_sample_object(rng, background) for _ in range(count))
    if len({(o.shape, o.color) for o in objects}) < count:
        return _sample_any_prompt(rng)
    relation = str(rng.choice(RELATIONS)) if count == 2 else None
    return PromptSpec(objects, background, relation=relation)


def relation_holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether centre ``first`` (x, y; y grows downwards) stands in ``relation`` to ``second``."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along > 0.1 and along > 0.8 * across


def position_holds(position: str, center: tuple[float, float]) -> bool:
    """Whether centre ``(x, y)`` in [0, 1]^2 is at the named position."""
    x, y = center
    return {
        "in the center": abs(x - 0.5) < 0.14 and abs(y - 0.5) < 0.14,
        "on the left": x < 0.42,
        "on the right": x > 0.58,
        "at the top": y < 0.42,
        "at the bottom": y > 0.58,
    }[position]


def sample_scene(spec: PromptSpec, rng: np.random.Generator, gap: float = 0.05) -> Scene:
    """Draw a scene that satisfies ``spec``: inside the frame, objects at least ``gap`` apart."""
    while True:
        objects: list[SceneObject] = []
        for wanted in spec.objects:
            size = wanted.size or str(rng.choice(SIZES))
            radius = float(rng.uniform(*RADII[size]))
            margin = radius * 1.05 + 0.03
            x, y = (float(v) for v in rng.uniform(margin, 1 - margin, size=2))
            angle = float(rng.normal(0.0, 0.06))
            objects.append(SceneObject(wanted.shape, wanted.color, size, x, y, radius, angle))
        if _consistent(spec, objects, gap):
            return Scene(tuple(objects), spec.background, float(rng.random()))


def _consistent(spec: PromptSpec, objects: list[SceneObject], gap: float) -> bool:
    for i, a in enumerate(objects):
        for b in objects[i + 1 :]:
            if np.hypot(a.x - b.x, a.y - b.y) < 1.05 * (a.radius + b.radius) + gap:
                return False
    centers = [(o.x, o.y) for o in objects]
    if spec.relation and not relation_holds(spec.relation, centers[0], centers[1]):
        return False
    return not (spec.position and not position_holds(spec.position, centers[0]))
