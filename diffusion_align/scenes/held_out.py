"""Prompts of the scenes world that no training has seen."""

from __future__ import annotations

import numpy as np

from diffusion_align.data import PairDataset, load_pairs

from .world.grammar import sample_prompt

#: Seeds of ``fresh_prompts``.
TEST_SEED, VALIDATION_SEED = 9001, 9002


def held_out_prompts(count: int) -> list[str]:
    """Captions of the shipped test pairs: never trained on, a quarter with colours and shapes never seen together.

    Raises:
        ValueError: more are asked for than there are.
    """
    pairs = load_pairs("scenes-pairs", "test", keep_ties=True)
    assert isinstance(pairs, PairDataset)
    prompts = list(dict.fromkeys(pairs.captions()))
    if not 2 <= count <= len(prompts):
        raise ValueError(f"--num-prompts {count}: expected 2 to {len(prompts)}, the held-out prompts that are shipped")
    return prompts[:count]


def draw_prompts(count: int, held_out_share: float, seed: int, exclude: set[str]) -> list[str]:
    """Distinct prompts outside ``exclude``; a share of them has colour-shape pairs never seen in training."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        text = sample_prompt(rng, held_out=bool(rng.random() < held_out_share)).text()
        if text not in exclude:
            prompts[text] = None
    return list(prompts)


def fresh_prompts(test: int, validation: int) -> tuple[list[str], list[str]]:
    """Prompts that no shipped training pair has, to test and to choose settings on; a quarter is of unseen pairs."""
    pairs = load_pairs("scenes-pairs", "train", keep_ties=True)
    assert isinstance(pairs, PairDataset)
    seen = set(pairs.captions())
    chosen_on = draw_prompts(validation, 0.25, VALIDATION_SEED, seen)
    return draw_prompts(test, 0.25, TEST_SEED, seen | set(chosen_on)), chosen_on
