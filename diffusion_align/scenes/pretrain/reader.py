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
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from diffusion_align.rewards.vp import VPScore
from diffusion_align.training.config import RewardConfig
from diffusion_align.training.scorers import reader_settings

from ..grammar import COLORS, SHAPES, SIZES, Scene
from ..make_comparisons import ASPECTS
from .corpus import Corpus, corpus_scenes

#: Places per side of a picture, the tower's tokens.
SIDE = 8
#: What is said of each place: nothing, or one of these.
KINDS = (SHAPES, COLORS, SIZES)
#: Weight of an empty place; nearly all are.
EMPTY = 0.1


def places_loss(said: Tensor, things: Tensor) -> Tensor:
    """Cross-entropy of shape, colour and size at each place.

    Args:
        said: (B, N, sum of 1 + each kind's number) logits.
        things: (B, N, 3) int64, 0 where no object has its centre.
    """
    total = said.new_zeros(())
    for part, target in zip(said.split([1 + len(kind) for kind in KINDS], dim=-1), things.unbind(-1), strict=True):
        weight = part.new_ones(part.shape[-1])
        weight[0] = EMPTY
        total = total + cross_entropy(part.flatten(0, 1), target.flatten(), weight)
    return total


def train_reader(
    corpus: Corpus, tokenizer: Path, out: Path, minutes: float, batch_size: int = 64, learning_rate: float = 1e-3
) -> None:
    """Write a VP-Score whose tower knows what is where; everything else of it has yet to be trained on verdicts."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    settings = reader_settings(RewardConfig(architecture="fine"), words)
    scorer = VPScore({**settings, "aspects": list(ASPECTS), "words": True}, words).train()
    tower, rng = scorer.reader.vision, np.random.default_rng(0)
    read_places = nn.Linear(tower.width, sum(1 + len(kind) for kind in KINDS))
    things = torch.stack([places(scene) for scene in corpus_scenes(len(corpus.captions))])
    parameters = [*tower.parameters(), *read_places.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.02)
    start, step, budget = time.time(), 0, minutes * 60
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = learning_rate * warm * (1 + math.cos(math.pi * elapsed / budget)) / 2
        images, found = reader_batch(corpus, things, rng, batch_size)
        loss = places_loss(read_places(tower(scorer.preprocess(images))), found)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step} {elapsed:.0f}s loss {loss.item():.3f}", flush=True)
    scorer.save_pretrained(out)
    print(f"trained {step} steps of {batch_size}", flush=True)


def places(scene: Scene) -> Tensor:
    """(SIDE^2, 3) int64: shape, colour and size, counted from 1, of the object whose centre is at each place."""
    found = torch.zeros(SIDE, SIDE, len(KINDS), dtype=torch.long)
    for thing in scene.objects:
        names = (thing.shape, thing.color, thing.size)
        number = [1 + kind.index(name) for kind, name in zip(KINDS, names, strict=True)]
        found[int(thing.y * SIDE), int(thing.x * SIDE)] = torch.tensor(number)
    return found.flatten(0, 1)


def reader_batch(corpus: Corpus, things: Tensor, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """``count`` pictures of the corpus, (B, 3, 64, 64) in [0, 1], half of them mirrored, and their ``things``."""
    images, where = [], []
    for row in rng.integers(len(corpus.captions), size=count):
        picture, found = corpus.images[row], things[row]
        if rng.random() < 0.5:
            picture, found = picture[:, ::-1], found.view(SIDE, SIDE, -1).flip(1).flatten(0, 1)
        images.append(torch.from_numpy(picture.copy()))
        where.append(found)
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255, torch.stack(where)
