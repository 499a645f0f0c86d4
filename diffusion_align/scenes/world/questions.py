"""What simulated users are asked about pictures: of their own prompts, and of others that differ from them a little."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

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
    sample_scene,
)


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


def mirrored_prompt(prompt: str) -> str:
    """What the mirror image of a picture of ``prompt`` shows."""
    return " ".join({"left": "right", "right": "left"}.get(word, word) for word in prompt.split(" "))


@dataclass(frozen=True)
class Questions:
    """What users are asked about each prompt's pictures besides every pair for the prompt itself.

    Attributes:
        rejudged: number of pairs for other prompts, near misses of their own: more verdicts on prompt-following from
            the same pictures.
        near_misses: number of other prompts for which every pair is judged, too.
        votes: users asked about each pair; labels are the mean of their verdicts.
        mirrored: show half of the prompts' pictures mirrored, left and right exchanged in the prompts too.
        marks: let users mark the words that a picture does not show.
        relations: the other prompts differ in the relation alone.

    Raises:
        ValueError: more near misses than there are other relations.
    """

    rejudged: int = 0
    near_misses: int = 0
    votes: int = 1
    mirrored: bool = False
    marks: bool = False
    relations: bool = False

    def __post_init__(self) -> None:
        if self.relations and self.near_misses >= len(RELATIONS):
            raise ValueError(f"near_misses = {self.near_misses}: there are {len(RELATIONS) - 1} other relations")

    def asked(self, prompt: str, per_prompt: int, rng: np.random.Generator) -> Iterator[tuple[str, int, int]]:
        """Each question, drawn as it is asked: what the pictures are judged for, and the numbers of a pair."""
        spec = parse_prompt(prompt)
        others = rng.permutation([each for each in RELATIONS if each != spec.relation]) if self.relations else ()
        for k in range(1 + self.near_misses):
            if k == 0:
                text = prompt
            elif self.relations:
                text = replace(spec, relation=str(others[k - 1])).text()
            else:
                text = near_miss(spec, rng).text()
            for a, b in combinations(range(per_prompt), 2):
                yield (text, b, a) if rng.random() < 0.5 else (text, a, b)
        for _ in range(self.rejudged):
            text = near_miss(spec, rng).text()
            a, b = rng.choice(per_prompt, 2, replace=False).tolist()
            yield text, a, b


#: Every pair of a prompt's pictures, judged once.
PLAIN = Questions()
