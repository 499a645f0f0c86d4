"""The reader of small scorers, taught to look before it judges: what is where, then BLIP's captioning and matching.

Verdicts alone teach colours and counts within thousands of pictures, but neither shapes nor places.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from diffusion_align.rewards.vp import VPScore
from diffusion_align.training.config import RewardConfig
from diffusion_align.training.scorers import reader_settings

from ..grammar import COLORS, SHAPES, SIZES, Scene, parse_prompt
from ..make_comparisons import ASPECTS, mirrored_prompt, near_miss
from .corpus import Corpus, corpus_scenes

#: Wrong captions beside each right one.
NEAR_MISSES = 3
#: Places per side of a picture, the tower's tokens.
SIDE = 8
#: What is said of each place: nothing, or one of these.
KINDS = (SHAPES, COLORS, SIZES)
#: Share of the time that only places are learnt.
LOOKING = 0.4
#: Weight of an empty place; nearly all are.
EMPTY = 0.1


class ReaderLoss:
    """Objectives of a reader that sees pictures of a corpus: places, and two of BLIP's (2201.12086, sec. 3.2)."""

    def __init__(self, scorer: VPScore) -> None:
        self.scorer = scorer
        self.words = nn.Linear(scorer.reader.width, len(scorer.tokenizer))
        self.things = nn.Linear(scorer.reader.vision.width, sum(1 + len(kind) for kind in KINDS))

    def places(self, seen: Tensor, things: Tensor) -> Tensor:
        """Cross-entropy of shape, colour and size at each place of what was ``seen`` (B, N, D).

        ``things`` (B, N, 3) are 0 where no object has its centre.
        """
        parts = self.things(seen).split([1 + len(kind) for kind in KINDS], dim=-1)
        total = seen.new_zeros(())
        for part, target in zip(parts, things.unbind(-1), strict=True):
            weight = part.new_ones(part.shape[-1])
            weight[0] = EMPTY
            total = total + cross_entropy(part.flatten(0, 1), target.flatten(), weight)
        return total

    def captioning(self, seen: Tensor, captions: list[str]) -> Tensor:
        """Cross-entropy of each token of ``captions`` (B) from the ones before and what was ``seen`` (B, N, D)."""
        tokens = self.scorer.tokenizer(captions, padding=True, return_tensors="pt")
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = self.scorer.reader.read(seen, ids[:, :-1], mask[:, :-1], causal=True)
        target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return cross_entropy(self.words(states).flatten(0, 1), target.flatten(), ignore_index=-100)

    def matching(self, seen: Tensor, captions: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the first of each picture's ``captions`` (B lists of K), by the score for prompt-following;
        and the share of wrong ones that score less."""
        count = len(captions[0])
        tokens = self.scorer.tokenizer([c for each in captions for c in each], padding=True, return_tensors="pt")
        beside = seen.repeat_interleave(count, dim=0)
        state = self.scorer.reader.read(beside, tokens.input_ids, tokens.attention_mask)[:, 0]
        scores = self.scorer.head(state)[:, 1].view(-1, count)
        right = (scores[:, :1] > scores[:, 1:]).float().mean()
        return cross_entropy(scores, torch.zeros(len(captions), dtype=torch.long)), right


def train_reader(
    corpus: Corpus, tokenizer: Path, out: Path, minutes: float, batch_size: int = 64, learning_rate: float = 1e-3
) -> None:
    """Write a VP-Score whose reader knows what scenes show and whose heads have yet to be trained on verdicts.

    One that an earlier run left at ``out`` is the start of this one, which then does not look at places alone first.
    """
    torch.manual_seed(0)
    going_on = (out / "scorer.json").is_file()
    if going_on:
        scorer = VPScore.from_pretrained(out).train()
    else:
        words = AutoTokenizer.from_pretrained(tokenizer)
        settings = reader_settings(RewardConfig(architecture="fine"), words)
        scorer = VPScore({**settings, "aspects": list(ASPECTS)}, words).train()
    losses, rng = ReaderLoss(scorer), np.random.default_rng(0)
    things = torch.stack([places(scene) for scene in corpus_scenes(len(corpus.captions))])
    parameters = [*scorer.parameters(), *losses.words.parameters(), *losses.things.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.02)
    start, step, budget = time.time(), 0, minutes * 60
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = learning_rate * warm * (1 + math.cos(math.pi * elapsed / budget)) / 2
        looking = not going_on and elapsed < LOOKING * budget
        batch = reader_batch(corpus, things, rng, batch_size)
        seen = scorer.reader.see([scorer.preprocess(batch.images)])
        found = {"places": losses.places(seen, batch.things)}
        if not looking:
            found["captioning"] = losses.captioning(seen, [each[0] for each in batch.captions])
            found["matching"], found["right"] = losses.matching(seen, batch.captions)
        optimizer.zero_grad()
        torch.stack([value for name, value in found.items() if name != "right"]).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            numbers = " ".join(f"{name} {value.item():.3f}" for name, value in found.items())
            print(f"step {step} {elapsed:.0f}s {numbers}", flush=True)
            scorer.save_pretrained(out)
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


@dataclass(frozen=True)
class ReaderBatch:
    """B pictures (B, 3, 64, 64) in [0, 1], each one's captions, the right one first, and ``things`` (B, N, 3)."""

    images: Tensor
    captions: list[list[str]]
    things: Tensor


def reader_batch(corpus: Corpus, things: Tensor, rng: np.random.Generator, count: int) -> ReaderBatch:
    """``count`` pictures of the corpus, half of them mirrored, beside near misses of their captions."""
    images, captions, where = [], [], []
    for row in rng.integers(len(corpus.captions), size=count):
        spec, picture, found = parse_prompt(corpus.captions[row]), corpus.images[row], things[row]
        texts = [corpus.captions[row], *(near_miss(spec, rng).text() for _ in range(NEAR_MISSES))]
        if rng.random() < 0.5:
            picture, texts = picture[:, ::-1], [mirrored_prompt(text) for text in texts]
            found = found.view(SIDE, SIDE, -1).flip(1).flatten(0, 1)
        images.append(torch.from_numpy(picture.copy()))
        captions.append(texts)
        where.append(found)
    return ReaderBatch(torch.stack(images).permute(0, 3, 1, 2).float() / 255, captions, torch.stack(where))
