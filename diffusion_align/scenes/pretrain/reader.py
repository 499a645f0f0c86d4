"""The picture tower of a small scorer, taught to look before it judges: what is where in rendered scenes.

Verdicts alone teach colours and counts within thousands of pictures, but neither shapes nor places.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoTokenizer

from diffusion_align.rewards.vp import ObjectTower, VPScore
from diffusion_align.training.config import RewardConfig
from diffusion_align.training.scorers import reader_settings

from ..grammar import COLORS, SHAPES, SIZES, Scene
from ..imperfect import blemished
from ..make_comparisons import ASPECTS
from .corpus import Corpus, corpus_scenes

#: Places per side of a picture.
SIDE = 8
#: What is said of each place: nothing, or one of these.
KINDS = (SHAPES, COLORS, SIZES)
#: Weight of an empty place; nearly all are.
EMPTY = 0.1
#: Weight of the centres' squared error, in places.
CENTRE = 10.0


def places_loss(kinds: list[Tensor], centre: Tensor, things: Tensor) -> Tensor:
    """Cross-entropy of shape, colour and size at each place, and the squared error of where in it the centre is.

    Args:
        kinds: logits (B, N, 1 + classes) of each kind.
        centre: (B, N, 2) in [0, 1].
        things: (B, N, 5): a class of each kind, 0 where no object has its centre, and the centre.
    """
    total = CENTRE * mse_loss(centre[things[..., 0] > 0], things[..., len(KINDS) :][things[..., 0] > 0])
    for i, part in enumerate(kinds):
        weight = part.new_ones(part.shape[-1])
        weight[0] = EMPTY
        total = total + cross_entropy(part.flatten(0, 1), things[..., i].long().flatten(), weight)
    return total


def train_reader(
    corpus: Corpus, tokenizer: Path, out: Path, minutes: float, batch_size: int = 64, learning_rate: float = 1e-3
) -> None:
    """Write a VP-Score whose tower finds objects; everything else of it has yet to be trained on verdicts."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    settings = reader_settings(RewardConfig(architecture="objects"), words)
    scorer = VPScore({**settings, "aspects": list(ASPECTS), "words": True}, words).train()
    tower, rng = scorer.reader.vision, np.random.default_rng(0)
    assert isinstance(tower, ObjectTower)
    things = torch.stack([places(scene) for scene in corpus_scenes(len(corpus.captions))])
    optimizer = torch.optim.AdamW(tower.parameters(), learning_rate, weight_decay=0.02)
    start, step, budget = time.time(), 0, minutes * 60
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = learning_rate * warm * (1 + math.cos(math.pi * elapsed / budget)) / 2
        images, found = reader_batch(corpus, things, rng, batch_size)
        loss = places_loss(*tower.said(tower.places(scorer.preprocess(images))), found)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step} {elapsed:.0f}s loss {loss.item():.3f}", flush=True)
    scorer.save_pretrained(out)
    print(f"trained {step} steps of {batch_size}", flush=True)


def places(scene: Scene) -> Tensor:
    """(SIDE^2, 5): shape, colour and size, counted from 1, of the object whose centre is at each place, and where in
    it that is, x and y in [0, 1]."""
    found = torch.zeros(SIDE, SIDE, len(KINDS) + 2)
    for thing in scene.objects:
        names = (thing.shape, thing.color, thing.size)
        number = [1 + kind.index(name) for kind, name in zip(KINDS, names, strict=True)]
        x, y = thing.x * SIDE, thing.y * SIDE
        found[int(y), int(x)] = torch.tensor([*number, x % 1, y % 1])
    return found.flatten(0, 1)


def reader_batch(corpus: Corpus, things: Tensor, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """``count`` pictures of the corpus, (B, 3, 64, 64) in [0, 1], blemished, half of them mirrored, and ``things``."""
    images, where = [], []
    for row in rng.integers(len(corpus.captions), size=count):
        picture, found = blemished(corpus.images[row], rng), things[row]
        if rng.random() < 0.5:
            picture, found = picture[:, ::-1], found.view(SIDE, SIDE, -1).flip(1).flatten(0, 1).clone()
            found[:, -2] = torch.where(found[:, 0] > 0, 1 - found[:, -2], 0.0)
        images.append(torch.from_numpy(picture.copy()))
        where.append(found)
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255, torch.stack(where)
