"""Online preference learning: pairs out of rewards, rounds, the loss, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion_align.adapters import load_adapter
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.engine.loop import TrainResult
from diffusion_align.training.engine.protocols import RunInterrupted
from diffusion_align.training.engine.randomness import NOISE, TIMESTEP, generator, mix, normal
from diffusion_align.training.methods import build_job
from diffusion_align.training.online.preference.config import OnlineDPOConfig
from diffusion_align.training.online.preference.method import OnlineDPOMethod
from diffusion_align.training.online.preference.pair_building import Counts
from diffusion_align.training.online.preference.renoised_lists import human_part, own_part
from diffusion_align.training.online.preference.rounds import Lists, Round, RoundFacts, RoundStream
from tests.brightness import Brightness
from tests.training.online.short_runs import brightness_gained, trained, weights

SHORT: dict[str, Any] = {
    "num_generations": 4,
    "prompts_per_rollout": 2,
    "rollout_batch_size": 8,
    "pairs_per_prompt": 2,
    "updates_per_picture": 2,
}


#: Comparisons of the rounds.
COMPARED: dict[str, Any] = {
    "eval_rounds": 1, "eval_steps": 4, "num_validation_prompts": 2, "validation_inference_steps": 2,
}  # fmt: skip

LISTS: dict[str, Any] = {"pairing": "lists", "pairs_per_prompt": 1, "prompts_per_rollout": 4, "min_distance": 0.5}


def build(settings: dict[str, Any], **changes: Any) -> OnlineDPOConfig:
    return OnlineDPOConfig(**{**settings, **SHORT, **changes})


def prepared(config: OnlineDPOConfig) -> OnlineDPOMethod:
    """A method before any step, whose policy is not its base."""
    method = build_job(config, build_accelerator(config), load_adapter(config.model), Brightness()).method
    assert isinstance(method, OnlineDPOMethod)
    with torch.no_grad():
        for index, parameter in enumerate(method.adapter.trainable_parameters().values()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return method


@pytest.mark.slow
def test_pictures_get_brighter_round_by_round(settings: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"model": "scenes-sdxl", "guidance_scale": 1.0, "learning_rate": 6e-3, "save_steps": 100}
    changes |= {"rollout_batch_size": 16, "min_timestep": 500, "max_steps": 4}
    assert brightness_gained(build(settings, **changes, per_device_train_batch_size=8, reference="sync")) > 0.02


def read_rounds(run: TrainResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"reference": "ema", "reference_decay": 0.5, "kl_beta": 0.1, **COMPARED},
        {"reference": "sync", "nesterov": 0.5, "draw_from": "reference"},
        {
            **LISTS,
            "loss_type": "lair",
            "replay_share": 0.5,
            "reference": "sync",
            "reference_sync_steps": 2,
            "reference_sync_alpha": 0.6,
            "train_guided": True,
            "num_iterations": 2,
        },
        {"extragradient": True, "loss_type": "ipo", "updates_per_picture": 1},
    ],
    ids=["ema, compared", "nesterov", "lists, replay, sync by steps", "extragradient"],
)
def test_a_run_resumes_bit_for_bit_inside_a_round(
    changes: dict[str, Any], settings: dict[str, Any], pairs_folder: Path
) -> None:
    if "replay_share" in changes:
        changes = changes | {"replay_dataset": str(pairs_folder)}
    config = build(settings | {"max_steps": 4, "num_inference_steps": 2, "save_steps": 1}, **changes)
    whole = trained(config)
    first, rounds = weights(whole.output_dir), [read_rounds(whole)]
    # As if the run had been killed at its fourth step: what it wrote after the third is there, and done again.
    (whole.output_dir / "checkpoint-00000004" / "manifest.json").unlink()
    resumed = trained(replace(config, resume_from_checkpoint="latest"))
    second = weights(resumed.output_dir)
    rounds.append(read_rounds(resumed))
    assert [line["step"] for line in resumed.history if "loss" in line] == [4]
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert rounds[0] == rounds[1]
    assert [row["round"] for row in rounds[0]] == list(range(len(rounds[0])))
    assert [row["after"] is not None for row in rounds[0]] == ["eval_rounds" in changes] * len(rounds[0])
    assert (whole.output_dir / "report.html").read_text().count("prompts accepted") == 1


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_the_loss_is_that_of_straight_lines(guided: bool, settings: dict[str, Any]) -> None:
    """DPO's -log sig(0.5 beta (s_w - s_l)) with one t and one noise for both pictures, and the penalty to the base."""
    config = build(
        settings, train_guided=guided, reference="sync", kl_beta=3.0, min_timestep=100, max_timestep=900, beta=500.0,
        num_inference_steps=2,
    )  # fmt: skip
    method = prepared(config)  # whose reference is what the policy was before it got away from its base
    adapter, batch = method.adapter, next(method.batches()).own
    assert len(batch.lists) == 4
    table = adapter.pipeline.scheduler.alphas_cumprod.double()
    prompts = batch.lists.prompts
    cond, null = adapter.encode_prompts(prompts), adapter.null_conditioning(len(prompts))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        output = adapter.predict(x, t, sized(cond)).output
        if not guided:
            return output.double()
        free = adapter.predict(x, t, sized(null)).output
        return (free + config.guidance_scale * (output - free)).double()

    def sized(conditioning: Any) -> Any:
        whole = method.policy.conditions(prompts, None)
        ids = None if whole.time_ids is None else whole.time_ids[: len(prompts)]
        return type(conditioning)(conditioning.embeds, conditioning.pooled, time_ids=ids)

    seeds = [mix(g, c, batch.number) for g, c in zip(batch.lists.group.tolist(), batch.column.tolist(), strict=True)]
    t = torch.cat([torch.randint(100, 900, (1,), generator=generator(seed, TIMESTEP)) for seed in seeds])
    eps = normal(torch.tensor(seeds), NOISE, batch.lists.latents.shape[2:])
    signal = table[t].view(-1, 1, 1, 1)
    margin, moved = [], []
    with torch.no_grad():
        for side, sign in ((0, 1.0), (1, -1.0)):
            x0 = batch.lists.latents[:, side].double()
            x_t = (signal.sqrt() * x0 + (1 - signal).sqrt() * eps.double()).float()
            policy = predict(x_t, t)
            with method.reference.active():
                reference = predict(x_t, t)
            with adapter.reference():
                base = predict(x_t, t)
            assert (policy - reference).abs().max() > 1e-3
            error, ref_error = (((each - eps) ** 2).flatten(1).mean(1) for each in (policy, reference))
            margin.append(sign * (ref_error - error))
            moved.append(((policy - base) ** 2).flatten(1).mean(1))
    expected = -logsigmoid(0.5 * config.beta * sum(margin)).mean() + 3.0 * torch.cat(moved).mean()
    loss, metrics = method.loss(type(next(method.batches()))(batch, None))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert metrics["reward_gap"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["lair", "plackett_luce"])
def test_lists_and_human_pairs_have_one_loss(loss_type: Any, settings: dict[str, Any], pairs_folder: Path) -> None:
    """Straight lines over the pictures that are there; the mean is over lists of K and human pairs alike."""
    changes = {**LISTS, "beta": 500.0, "min_distance": 6.28, "replay_share": 0.25, "replay_dataset": str(pairs_folder)}
    method = prepared(build(settings, **changes, loss_type=loss_type))
    batch = next(method.batches())
    lists = batch.own.lists
    assert lists.latents.shape[:2] == (3, 4)
    assert lists.mask is not None
    parts = [own_part(batch.own, method.adapter.device, None)]
    assert batch.human is not None
    parts.append(human_part(batch.human, method.adapter))
    total = 0.0
    for part in parts:
        for row in range(len(part)):
            there = range(part.x0.shape[1]) if part.mask is None else part.mask[row].nonzero().flatten().tolist()
            seed = int(part.seeds[row])
            t = torch.randint(0, 1000, (1,), generator=generator(seed, TIMESTEP))
            eps = normal(torch.tensor([seed]), NOISE, part.x0.shape[2:])
            signal = method.adapter.pipeline.scheduler.alphas_cumprod[t]
            r = []
            for k in there:
                x_t = signal.sqrt() * part.x0[row, k] + (1 - signal).sqrt() * eps
                cond = method.policy.conditions([part.prompts[row]], None)
                with torch.no_grad():
                    ours = ((method.adapter.predict(x_t, t, cond).output - eps) ** 2).mean()
                    with method.adapter.reference():
                        theirs = ((method.adapter.predict(x_t, t, cond).output - eps) ** 2).mean()
                r.append(float(0.5 * 500.0 * (theirs - ours)))
            n = len(r)
            if loss_type == "lair":  # the best first: it beats all others, the last one none
                total += 2 / n * sum((value - ((n - 1 - i) / (n - 1) - 0.5)) ** 2 for i, value in enumerate(r))
            else:
                total += sum(float(torch.tensor(r[i:]).logsumexp(0)) - r[i] for i in range(n - 1)) / (n - 1)
    assert method.loss(batch)[0].item() == pytest.approx(total / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairing": "lists", "pairs_per_prompt": 1}, "pairing lists needs a loss on lists"),
        ({"loss_type": "lair", "safeguard_mu": 0.5}, "safeguard_mu is for losses on pairs: loss_type lair"),
        ({"lair_lambda": 2.0}, "lair_lambda is an option of loss_type lair, found sigmoid"),
        ({"score_target": 1.0, "loss_type": "ipo", "replay_share": 0.5}, "score_target needs rewards"),
        (
            {"reference": "ema", "nesterov": 0.3},
            "nesterov = 0.3 needs a reference that is copied at the start of every",
        ),
        ({"extragradient": True}, "extragradient needs loss_type ipo, not sigmoid"),
        ({"pairs_per_prompt": 3}, "pairs_per_prompt = 3: pairing best_worst makes 2 of 4 pictures at most"),
        ({"initial_noise": "shared"}, "initial_noise shared needs eta above 0"),
        ({"replay_share": 0.3}, "of per_device_train_batch_size = 4 pairs that is no whole number"),
        ({"draw_from": "reference"}, "draw_from = reference has no effect: the reference is frozen"),
        ({"eval_rounds": 1}, "eval_rounds = 1 needs eval_steps"),
        ({"zero_advantage": "skip"}, "leaves out prompts by min_spread and min_gap"),
        ({"standardise": "prompt"}, "standardise = prompt has no effect: it is an ensemble's"),
        ({"per_device_train_batch_size": 16}, "a round has 8 training items at most, an optimiser step takes 16"),
    ],
)
def test_settings_that_do_not_fit_are_one_error(
    changes: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        build(settings, **changes).check()


def round_of(pairs: int) -> Round:
    facts = RoundFacts(Counts(4, 0, 0, 4, 0, 0), 8, 0.0, 1.0, 80.0)
    reward = torch.arange(2.0 * pairs).view(pairs, 2)
    return Round(
        Lists([str(i) for i in range(pairs)], torch.zeros(pairs, 2, 1, 1, 1), reward, torch.arange(pairs)), facts
    )


def test_two_processes_go_through_a_round_as_one() -> None:
    """Also when the pairs that are left are no whole number of optimiser steps."""
    draw = [round_of(5), round_of(3)].__getitem__
    one = iter(RoundStream(draw, columns=3, batch_size=4, steps=2, seed=1))
    two = [iter(RoundStream(draw, columns=3, batch_size=2, steps=2, seed=1, rank=r, world_size=2)) for r in range(2)]
    seen = []
    for _ in range(4 + 4):  # 15 and 9 items are filled up to 16
        whole, parts = next(one), [next(each) for each in two]
        assert whole.lists.prompts == [name for part in parts for name in part.lists.prompts]
        assert torch.equal(whole.column, torch.cat([part.column for part in parts]))
        seen += [(whole.number, *item) for item in zip(whole.lists.prompts, whole.column.tolist(), strict=True)]
    assert len(seen) == 32
    assert len(set(seen[:15])) == 15
    assert len(set(seen[16:25])) == 9


def test_a_run_without_pairs_stops_and_says_why() -> None:
    nothing = Round(round_of(0).lists, RoundFacts(Counts(4, 3, 1, 2, 2, 0), 8, 0.0, 0.0, 80.0))
    stream = RoundStream(lambda number: nothing, columns=3, batch_size=4, steps=2, seed=1)
    with pytest.raises(RunInterrupted, match="of the last one's 4 prompts 3 have a spread below min_spread"):
        next(iter(stream))
    assert stream.number == 20
