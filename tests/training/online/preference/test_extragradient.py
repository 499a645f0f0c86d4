"""Two rounds for one step, against straight lines."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffusion_align.rewards.combine import Ensemble
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.methods import build_job
from diffusion_align.training.online.preference.config import OnlineDPOConfig
from diffusion_align.training.online.preference.extragradient import beats, wins_among
from diffusion_align.training.online.preference.method import OnlineDPOMethod
from tests.brightness import Brightness
from tests.training.online.test_craft import Redness


def test_three_voters_need_not_be_transitive() -> None:
    """Each of three pictures beats the next with two votes of three, and the third beats the first."""
    votes = torch.tensor([[[3.0, 1.0, 2.0], [2.0, 3.0, 1.0], [1.0, 2.0, 3.0]]])
    found = beats(votes, votes, 1e-3)[0]
    assert [found[i, (i + 1) % 3].item() for i in range(3)] == pytest.approx([2 / 3] * 3)
    assert wins_among(votes, 1e-3)[0].tolist() == pytest.approx([0.5] * 3)


def test_probabilities_are_those_of_straight_lines() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 2, generator=generator), torch.randn(2, 4, 2, generator=generator)
    found, own = beats(first, second, 0.7), wins_among(first, 0.7)
    for p in range(2):
        for k in range(3):
            for j in range(4):
                gaps = [(first[p, k, m] - second[p, j, m]).item() / 0.7 for m in range(2)]
                expected = sum(1 / (1 + math.exp(-gap)) for gap in gaps) / 2
                assert found[p, k, j].item() == pytest.approx(expected, rel=1e-5)
            others = [beats(first[p : p + 1, k : k + 1], first[p : p + 1, i : i + 1], 0.7) for i in range(3) if i != k]
            assert own[p, k].item() == pytest.approx(sum(x.item() for x in others) / 2, rel=1e-5)


@pytest.mark.slow
def test_the_whole_step_starts_where_the_half_step_did(settings: dict[str, Any]) -> None:
    """On the same pictures, aimed at their chances against those of the policy in between."""
    own: dict[str, Any] = {"num_generations": 4, "prompts_per_rollout": 2, "updates_per_picture": 2}
    own |= {"extragradient": True, "loss_type": "ipo", "judge_temperature": 0.05, "scorers": ("a", "b"), "beta": 100.0}
    config = OnlineDPOConfig(**{**settings, **own, "rollout_batch_size": 8, "num_inference_steps": 2, "max_steps": 2})
    scorer = Ensemble([Brightness(), Redness()], standardise="none")
    method = build_job(config, build_accelerator(config), None, scorer).method
    assert isinstance(method, OnlineDPOMethod)
    batches, parameters = method.batches(), method.adapter.trainable_parameters()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    half = next(batches)
    assert half.own.number == 0
    pictures = method.engine.draw(0)
    with torch.no_grad():
        for i, parameter in enumerate(parameters.values()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    opponents = method.engine.draw(0)
    whole = next(batches)
    assert whole.own.number == 1
    assert all(torch.equal(parameter, start[name]) for name, parameter in parameters.items())
    assert pictures.members is not None
    assert opponents.members is not None
    ours, theirs = (each.members.view(2, 4, 2) for each in (pictures, opponents))
    chance = ((ours[:, :, None] - theirs[:, None]) / 0.05).sigmoid().mean(dim=(2, 3)).flatten()
    for row, (prompt, latents) in enumerate(zip(whole.own.lists.prompts, whole.own.lists.latents, strict=True)):
        places = [next(i for i in range(8) if torch.equal(pictures.latents[i], one)) for one in latents]
        assert [pictures.prompts[place] for place in places] == [prompt] * 2
        assert whole.own.lists.reward[row].tolist() == pytest.approx([chance[place].item() for place in places])
    # At the start u is 0: what is left of IPO's loss is the square of its target.
    targets = 0.5 * (whole.own.lists.reward[:, 0] - whole.own.lists.reward[:, 1])
    assert method.loss(whole)[0].item() == pytest.approx(targets.square().mean().item(), rel=1e-4)
