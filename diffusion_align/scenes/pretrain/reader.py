"""The picture tower of a small scorer, taught to look before it judges: what is where in pictures.

Verdicts alone teach colours and counts within thousands of pictures, but neither shapes nor places. First come rendered
scenes; then, with ``--pictures``, a model's own, in which people say what they see.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torchvision.transforms.v2.functional import adjust_hue
from transformers import AutoTokenizer

from diffusion_align.rewards.protocol import RewardScorer
from diffusion_align.rewards.trained.architectures import reader_settings
from diffusion_align.rewards.trained.vp import ObjectTower, VPScore
from diffusion_align.scenes.make.comparisons import ASPECTS
from diffusion_align.scenes.make.pairs import decode_jpeg, split_file
from diffusion_align.scenes.world.grammar import COLORS, HELD_OUT_COMPOSITIONS, SHAPES, SIZES, SceneObject
from diffusion_align.scenes.world.imperfect import blemished
from diffusion_align.scenes.world.vision import FoundObject, detect

from .corpus import Corpus, corpus_scenes

#: Places per side of a picture.
SIDE = 8
#: What is said of each place: nothing, or one of these.
KINDS = (SHAPES, COLORS, SIZES)
COLOR = KINDS.index(COLORS)
#: What an object is, where nobody says.
UNTOLD = -1
#: Weight of an empty place; nearly all are.
EMPTY = 0.1
#: Weight of the centres' squared error, in places.
CENTRE = 10.0
#: Of a batch with a model's pictures, the share that is rendered; and the share of all that is shown in other colours.
RENDERED, RECOLOURED = 0.25, 0.5
#: Pictures that are turned by one hue.
HUE_GROUP = 8


@dataclass(frozen=True)
class Pictures:
    """``images`` (N, 64, 64, 3) uint8, and what is where in each (``places``): ``things`` (N, SIDE^2, 5)."""

    images: NDArray[np.uint8]
    things: Tensor


def rendered_pictures(corpus: Corpus) -> Pictures:
    """The corpus, and what its scenes hold."""
    scenes = corpus_scenes(len(corpus.captions))
    return Pictures(corpus.images, torch.stack([places(scene.objects) for scene in scenes]))


def seen_pictures(folders: Sequence[Path]) -> Pictures:
    """The training pictures of judged folders, and what people (here the oracle's eye) see in them."""
    from datasets import Dataset

    files: dict[bytes, None] = {}
    for folder in folders:
        table = Dataset.from_parquet(str(split_file(folder, "train")))
        files |= dict.fromkeys(file for column in ("jpg_0", "jpg_1") for file in table[column])
    images = np.stack([decode_jpeg(file) for file in files])
    return Pictures(images, torch.stack([places(detect(image).objects) for image in images]))


def places_loss(kinds: list[Tensor], centre: Tensor, things: Tensor) -> Tensor:
    """Cross-entropy of shape, colour and size at each place, and the squared error of where in it the centre is.

    Args:
        kinds: logits (B, N, 1 + classes) of each kind.
        centre: (B, N, 2) in [0, 1].
        things: (B, N, 5): a class of each kind, 0 where no object has its centre, ``UNTOLD`` where nobody says; and the
            centre.
    """
    there = things[..., 0] != 0
    total = CENTRE * mse_loss(centre[there], things[there][:, len(KINDS) :])
    for i, part in enumerate(kinds):
        weight = part.new_ones(part.shape[-1])
        weight[0] = EMPTY
        told = things[..., i].long().flatten()
        total = total + cross_entropy(part.flatten(0, 1), told, weight, ignore_index=UNTOLD)
    return total


def new_reader(tokenizer: Path) -> VPScore:
    """A VP-Score whose tower finds objects, untrained; the same each time."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    settings = reader_settings("objects", words)
    return VPScore({**settings, "aspects": list(ASPECTS), "words": True}, words)


def train_reader(
    scorer: RewardScorer,
    rendered: Pictures,
    out: Path,
    minutes: float,
    seen: Pictures | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> None:
    """Teach the tower of ``scorer`` what is where; everything else of it stays as it is.

    With ``seen`` pictures three quarters of a batch are those, and half of a batch has other hues: its shapes are to be
    known in any colour, and nobody is asked for the colour.

    Raises:
        ValueError: ``scorer`` is not a vp-score whose tower finds objects.
    """
    if not (isinstance(scorer, VPScore) and isinstance(scorer.reader.vision, ObjectTower)):
        raise ValueError(f"{scorer.name}: expected a vp-score of architecture 'objects'")
    tower, rng = scorer.reader.vision, np.random.default_rng(0)
    parameters = [each for name in tower.seeing for each in getattr(tower, name).parameters()]
    scorer.train().requires_grad_(False)
    for each in parameters:
        each.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.02)
    start, step, budget = time.time(), 0, minutes * 60
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = learning_rate * warm * (1 + math.cos(math.pi * elapsed / budget)) / 2
        images, things = reader_batch(rendered, rng, batch_size if seen is None else int(RENDERED * batch_size))
        if seen is not None:
            others, more = reader_batch(seen, rng, batch_size - len(images), blemish=False)
            order = torch.from_numpy(rng.permutation(batch_size))
            images, things = torch.cat([images, others])[order], torch.cat([things, more])[order]
            turned = slice(int(RECOLOURED * batch_size))
            recolour(images[turned], things[turned], rng)
        loss = places_loss(*tower.said(tower.places(scorer.preprocess(images))), things)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step} {elapsed:.0f}s loss {loss.item():.3f}", flush=True)
    scorer.save_pretrained(out)
    print(f"trained {step} steps of {batch_size}", flush=True)


def places(objects: Sequence[SceneObject | FoundObject]) -> Tensor:
    """(SIDE^2, 5): shape, colour and size, counted from 1, of the object whose centre is at each place, and where in
    it that is, x and y in [0, 1].

    Nobody says what a thing without a shape is; nor the shape of a colour-shape pair that is held out, which a model
    draws now and then.
    """
    found = torch.zeros(SIDE, SIDE, len(KINDS) + 2)
    for thing in objects:
        names = (thing.shape, thing.color, thing.size)
        number = [
            UNTOLD if thing.shape is None else 1 + kind.index(name) for kind, name in zip(KINDS, names, strict=True)
        ]
        if (thing.color, thing.shape) in HELD_OUT_COMPOSITIONS:
            number[0] = UNTOLD
        x, y = (min(max(at, 0.0), 0.999) * SIDE for at in (thing.x, thing.y))
        found[int(y), int(x)] = torch.tensor([*number, x % 1, y % 1])
    return found.flatten(0, 1)


def reader_batch(
    pictures: Pictures, rng: np.random.Generator, count: int, blemish: bool = True
) -> tuple[Tensor, Tensor]:
    """``count`` of the pictures, (B, 3, 64, 64) in [0, 1], half of them mirrored, and ``things``."""
    images, where = [], []
    for row in rng.integers(len(pictures.images), size=count):
        picture, found = pictures.images[row], pictures.things[row]
        if blemish:
            picture = blemished(picture, rng)
        if rng.random() < 0.5:
            picture, found = picture[:, ::-1], found.view(SIDE, SIDE, -1).flip(1).flatten(0, 1).clone()
            found[:, -2] = torch.where(found[:, 0] != 0, 1 - found[:, -2], 0.0)
        images.append(torch.from_numpy(picture.copy()))
        where.append(found)
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255, torch.stack(where)


def recolour(images: Tensor, things: Tensor, rng: np.random.Generator) -> None:
    """Turn the hues of ``images`` (B, 3, S, S) in place; what colours objects have now is ``UNTOLD``."""
    for group in images.split(HUE_GROUP):
        group.copy_(adjust_hue(group, float(rng.uniform(-0.5, 0.5))))
    things[..., COLOR] = torch.where(things[..., COLOR] != 0, float(UNTOLD), 0.0)
