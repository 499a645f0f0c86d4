"""Switches that go with any loss: safeguards, swapped and weighted pairs, moving references, curriculum, timesteps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_align.adapters import Adapter, Conditioning, load_adapter
from diffusion_align.data import PairBatch, load_pairs
from diffusion_align.objectives import PairStats
from diffusion_align.process import OUTPUTS
from diffusion_align.process.levels import Level
from diffusion_align.process.outputs import min_snr_weight
from diffusion_align.process.path import VariancePreserving, scaled_linear
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig, SFTConfig
from diffusion_align.training.pairs.job import drawn_noise
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.pairs.reference import NoisyPairs
from diffusion_align.training.pairs.switches.curriculum import Curriculum, build_curriculum, label_gaps
from diffusion_align.training.pairs.switches.moving_reference import MovingReference
from diffusion_align.training.pairs.switches.per_pair import pair_changes, pair_strength
from diffusion_align.training.pairs.switches.timesteps import drawn_times
from diffusion_align.training.run import train
from diffusion_align.training.settings import validated


@pytest.fixture(scope="module")
def adapter(sd_v_folder: Path) -> Adapter:
    return load_adapter(sd_v_folder).train_lora(rank=4)


@pytest.fixture
def fresh(adapter: Adapter) -> Iterator[Adapter]:
    """The adapter, put back afterwards."""
    before = {name: p.detach().clone() for name, p in adapter.trainable_parameters().items()}
    yield adapter
    for name, parameter in adapter.trainable_parameters().items():
        parameter.data.copy_(before[name])
        parameter.grad = None


@pytest.fixture(scope="module")
def batch(adapter: Adapter) -> PairBatch:
    """Three pairs whose rejected latents are three times the chosen ones: with predicted velocity their gradients point
    the same way, and the rejected one's is longer."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([x, 3 * x])
    cond = adapter.encode_prompts(["a", "b", "c"])
    sizes = torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(2, 3, 6)
    return PairBatch(
        ["a", None, "c"], sizes, torch.ones(3), torch.ones(3), torch.tensor([1, 2, 3]), ["row 0", "row 1", "row 2"],
        posterior=(mean, torch.zeros_like(mean)), cond=Conditioning(cond.embeds, cond.pooled),
    )  # fmt: skip


def method(adapter: Adapter, **settings: Any) -> PairMethod:
    config = DPOConfig(**{"beta": 20.0, "min_timestep": 400, "max_timestep": 900} | settings)
    return PairMethod(config, adapter, None, drawn_noise(config, adapter))  # type: ignore[arg-type]


def moved_a_little(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.trainable_parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("safeguard", ["sample", "batch"])
def test_the_chosen_error_rises_without_the_safeguard_and_falls_with_it(
    safeguard: Any, fresh: Adapter, batch: PairBatch
) -> None:
    before = {name: p.detach().clone() for name, p in fresh.trainable_parameters().items()}
    change = {}
    for mu in (None, 0.0):
        for name, parameter in fresh.trainable_parameters().items():
            parameter.data.copy_(before[name])
        run = method(fresh, safeguard_mu=mu, safeguard=safeguard)
        optimizer = torch.optim.SGD(fresh.trainable_parameters().values(), lr=0.3)
        lines = []
        for _ in range(5):
            loss, metrics = run.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lines.append(metrics)
        assert lines[0]["kappa"] > 1
        assert lines[-1]["loss"] < lines[0]["loss"]
        assert (lines[0]["moved"], lines[0]["loss"].item()) == (0, pytest.approx(0.693147))
        assert lines[-1]["moved"] > 0
        change[mu] = (lines[-1]["error_chosen"] - lines[0]["error_chosen"]).item()
    assert change[None] > 1e-4
    assert change[0.0] < -1e-4


@pytest.mark.slow
def test_moved_and_kappa_are_those_of_the_outputs(fresh: Adapter, batch: PairBatch) -> None:
    moved_a_little(fresh)
    run = method(fresh)
    _, metrics = run.loss(batch)
    noisy = run.noisy(batch, batch.seeds)
    with torch.no_grad():
        policy = noisy.output(fresh).double()
    with fresh.reference():
        reference = noisy.output(fresh).double()
    assert metrics["moved"].item() == pytest.approx(((policy - reference) ** 2).mean().item(), rel=1e-5)
    d_w, d_l = (policy - noisy.target).chunk(2)
    kappa = ((d_w * d_l).sum(dim=(1, 2, 3)) / (d_w**2).sum(dim=(1, 2, 3))).mean()
    assert metrics["kappa"].item() == pytest.approx(kappa.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("swap", [True, None])
def test_swapped_labels_are_pairs_with_the_pictures_exchanged(swap: Any, fresh: Adapter, batch: PairBatch) -> None:
    moved_a_little(fresh)
    assert batch.posterior is not None
    mean, std = batch.posterior
    where = torch.tensor([True, True, True] if swap else [False, True, False]).view(1, 3, 1, 1, 1)
    exchanged = replace(batch, posterior=(torch.where(where, mean.flip(0), mean), std))
    found, metrics = method(fresh, swap_labels=swap, caption_dropout=0.1).loss(batch)
    expected, other = method(fresh).loss(exchanged)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name in ("margin", "error_chosen", "error_rejected", "kappa", "moved"):
        assert metrics[name].item() == pytest.approx(other[name].item(), rel=1e-4), name
    assert abs(found.item() - method(fresh).loss(batch)[0].item()) > 1e-3


@pytest.mark.slow
def test_noise_levels_weigh_pairs_and_pictures(fresh: Adapter, batch: PairBatch) -> None:
    moved_a_little(fresh)
    run = method(fresh, timestep_weight="min-snr", min_snr_gamma=1.0)
    found = run.loss(batch)[0].item()
    t = run.noisy(batch, batch.seeds).t[:3]
    signal = fresh.pipeline.scheduler.alphas_cumprod.double()[t]
    snr = signal / (1 - signal)
    weight = torch.minimum(snr, torch.ones(3)) / (snr + 1)  # this model predicts v
    losses = [method(fresh).loss(batch.rows([i]))[0].item() for i in range(3)]
    assert found == pytest.approx(
        np.mean([w * each for w, each in zip(weight.tolist(), losses, strict=True)]), rel=1e-4
    )


def test_min_snr_weights_are_the_published_ones() -> None:
    signal = torch.tensor([0.99, 0.5, 0.01, 0.0], dtype=torch.float64).view(-1, 1, 1, 1)
    snr = (signal / (1 - signal)).flatten()
    found = {name: min_snr_weight(kind, Level.from_alpha_bar(signal), 5.0).flatten() for name, kind in OUTPUTS.items()}
    least = snr.clamp(max=5)
    torch.testing.assert_close(found["epsilon"], torch.cat([(least / snr)[:3], torch.ones(1)]))
    torch.testing.assert_close(found["v_prediction"], least / (snr + 1))
    torch.testing.assert_close(found["sample"], least)


def test_margin_dropout_leaves_the_chosen_gradient_alone(batch: PairBatch) -> None:
    device = torch.device("cpu")
    e = (torch.rand(4, 3) + 1).unbind(0)
    stats = PairStats(e[0].clone().requires_grad_(), e[1].clone().requires_grad_(), e[2], e[3])
    weakened = pair_changes(DPOConfig(margin_dropout=1.0), batch, device).weakened(stats)
    assert torch.equal(weakened.rejected, stats.rejected)
    (weakened.chosen - weakened.rejected).sum().backward()
    assert stats.chosen.grad is not None
    assert stats.rejected.grad is not None
    assert (stats.chosen.grad.tolist(), stats.rejected.grad.tolist()) == ([1, 1, 1], [0, 0, 0])
    many = replace(batch, seeds=torch.arange(2000))
    keep = pair_changes(DPOConfig(margin_dropout=0.75), many, device).keep
    assert keep is not None
    assert keep.mean().item() == pytest.approx(0.25, abs=0.03)
    again = pair_changes(DPOConfig(margin_dropout=0.75), many, device).keep
    assert again is not None
    assert torch.equal(keep, again)


def test_soft_labels_and_scores_become_weights_and_targets(batch: PairBatch) -> None:
    device, soft = torch.device("cpu"), replace(batch, preference=torch.tensor([1.0, 0.75, 0.5]))
    weighted = pair_strength(DPOConfig(pair_beta=10.0), soft, device)
    assert weighted.pair_beta is not None
    assert (weighted.pair_beta.tolist(), weighted.uses_labels) == ([10, 5, 0], False)
    assert pair_strength(DPOConfig(), soft, device).uses_labels
    aiming = DPOConfig(loss_type="ipo", score_target=2.0)
    scored = replace(soft, score=torch.tensor([[1.0, 0.5], [0.0, 1.0], [3.0, 3.0]]))
    target = pair_strength(aiming, scored, device).target
    assert target is not None
    assert target.tolist() == [1, -2, 0]
    with pytest.raises(ValueError, match="score_target needs pairs with scores: row 0 has none"):
        pair_strength(aiming, soft, device)


@pytest.mark.slow
def test_a_run_weighs_beta_by_soft_labels(fresh: Adapter, batch: PairBatch) -> None:
    moved_a_little(fresh)
    soft = replace(batch, preference=torch.tensor([0.75, 0.75, 0.75]))
    found, _ = method(fresh, pair_beta=4.0).loss(soft)
    assert found.item() == pytest.approx(method(fresh, beta=40.0).loss(batch)[0].item(), rel=1e-5)


# -- moving references -----------------------------------------------------------------------------------------------


class OneNumber:
    """An adapter whose output is w x."""

    def __init__(self, value: float) -> None:
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {"w": self.weight}

    def predict(self, x_t: Tensor, t: Tensor, cond: Any) -> Any:
        return SimpleNamespace(output=self.weight * x_t)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"reference": "ema", "reference_decay": 0.9},
        {"reference": "sync", "reference_sync_steps": 3, "reference_sync_alpha": 0.6},
    ],
)
def test_the_reference_follows_the_policy(settings: dict[str, Any], accumulation: int) -> None:
    adapter: Any = OneNumber(1.0)
    config = DPOConfig(gradient_accumulation_steps=accumulation, **settings)
    reference = MovingReference(config, adapter)
    noisy: Any = NoisyPairs(torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), torch.zeros(2), None)  # type: ignore[arg-type]
    expected, saved = 1.0, None
    for step in range(1, 9):
        for _ in range(accumulation):
            answer = reference.answer(noisy, ["a"], torch.zeros(1))
            assert answer.output is not None
            assert answer.output.flatten()[0].item() == pytest.approx(expected)
            assert answer.errors.tolist() == pytest.approx([expected**2] * 2)
            assert not answer.output.requires_grad
            assert adapter.weight.item() == step
        adapter.weight.data += 1  # the optimiser's step
        if settings["reference"] == "ema":
            expected = 0.9 * expected + 0.1 * (step + 1)
        elif step % 3 == 0:
            expected = 0.6 * (step + 1) + 0.4 * expected
        if step == 4:
            saved = {name: value.clone() if name != "reference_steps" else value
                     for name, value in reference.state_dict().items()}  # fmt: skip
            other: Any = OneNumber(5.0)
            resumed = MovingReference(config, other)
            resumed.load_state_dict(saved)
            again = resumed.answer(noisy, ["a"], torch.zeros(1)).output
            assert again is not None
            assert again.flatten()[0].item() == pytest.approx(expected)


@pytest.mark.slow
def test_a_resumed_run_with_a_moving_reference_is_bit_for_bit_one_run(
    sdxl_folder: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    config = DPOConfig(
        model=str(sdxl_folder), dataset=str(pairs_folder), output_dir=str(tmp_path / "one"), max_steps=4, save_steps=2,
        learning_rate=1e-2, beta=500.0, lora_rank=2, logging_steps=1, report_to="none", progress=False,
        reference="ema", reference_decay=0.5, save_total_limit=5,
    )  # fmt: skip
    one = train(config)
    resumed = train(
        replace(
            config, output_dir=str(tmp_path / "two"), resume_from_checkpoint=str(tmp_path / "one/checkpoint-00000002")
        )
    )
    lines = [[line["loss"], line["frozen/margin"], line["moved"]] for line in one.history]
    assert [[line["loss"], line["frozen/margin"], line["moved"]] for line in resumed.history] == lines[2:]
    for name in ("policy", "method"):
        first, second = (
            load_file(tmp_path / run / f"checkpoint-00000004/{name}.safetensors") for run in ("one", "two")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    line = one.history[-1]
    assert line["frozen/margin"] != line["margin"]
    assert line["frozen/moved"] > line["moved"] > 0
    assert "frozen/chosen_error_up" in line


# -- curriculum ------------------------------------------------------------------------------------------------------


def test_a_curriculum_begins_with_the_surest_and_ends_with_all() -> None:
    gaps = np.array([0.1, 0.9, 0.5, 0.9, 0.2, 0.7, 0.0, 0.3, 0.6, 0.4])
    order = Curriculum(gaps, chunks=5, length=20, seed=0)
    for chunk in range(5):
        met = [order(position) for position in range(20 * chunk, 20 * chunk + 20)]
        surest = set(np.argsort(-gaps, kind="stable")[: 2 * (chunk + 1)].tolist())
        assert set(met) == surest
        counts = np.bincount(met, minlength=10)[sorted(surest)]
        assert counts.max() - counts.min() <= 1
    later = [order(position) for position in range(80, 110)]
    assert np.bincount(later).tolist() == [3] * 10
    assert [Curriculum(gaps, 5, 20, 0)(position) for position in (3, 77, 99)] == [order(p) for p in (3, 77, 99)]
    assert [Curriculum(gaps, 5, 20, 1)(position) for position in range(80, 110)] != later


def test_curricula_that_order_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="soft labels, and these are all the same"):
        Curriculum(np.ones(10), 5, 10, 0)
    with pytest.raises(ValueError, match="curriculum_chunks = 5: there are 3 pairs only"):
        Curriculum(np.arange(3.0), 5, 10, 0)


@pytest.mark.slow
def test_a_run_reads_its_pairs_in_the_order_of_the_curriculum(adapter: Adapter, tmp_path: Path) -> None:
    from PIL import Image

    rows = []
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(f'{{"chosen": "{i}.png", "rejected": "0.png", "caption": "{i}", "preference": {1 - 0.05 * i}}}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    config = DPOConfig(dataset=str(tmp_path), per_device_train_batch_size=2, curriculum="label", curriculum_chunks=3,
                       curriculum_steps=2, dataloader_num_workers=0)  # fmt: skip
    assert label_gaps(load_pairs(tmp_path)).tolist() == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5])  # type: ignore[arg-type]
    source = build_pair_source(config, adapter, order=lambda pairs, count: build_curriculum(config, pairs, count))
    batches = iter(source)
    met = [next(batches).captions for _ in range(6)]
    assert {caption for captions in met[:2] for caption in captions} == {"0", "1"}
    assert {caption for captions in met[2:4] for caption in captions} == {"0", "1", "2", "3"}
    assert len({caption for captions in met[4:] for caption in captions} & {"4", "5"}) > 0


# -- timesteps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"timestep_density": "late"}, lambda share: share**2),
        (
            {"timestep_density": "logit-normal", "timestep_logit_mean": 0.5, "timestep_logit_std": 0.8},
            lambda share: torch.distributions.Normal(0.5, 0.8).cdf(torch.logit(torch.tensor(share))).item(),
        ),
        ({}, lambda share: share),
    ],
)
def test_timesteps_have_the_density_that_is_asked_for(settings: dict[str, Any], expected: Any) -> None:
    path = VariancePreserving(scaled_linear().float(), OUTPUTS["epsilon"])
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    found = drawn_times(DPOConfig(**settings), path, generators, 200, 1000)
    assert (found.dtype, int(found.min()) >= 200, int(found.max()) <= 999) == (torch.int64, True, True)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert (found < 200 + 800 * share).float().mean().item() == pytest.approx(expected(share), abs=0.03)


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (DPOConfig, {"safeguard_mu": 1.5}, "safeguard_mu = 1.5 is wrong"),
        (DPOConfig, {"loss_type": "lair", "safeguard_mu": 0.5}, "safeguard_mu is for losses on pairs: loss_type lair"),
        (DPOConfig, {"loss_type": "dgpo", "swap_labels": True}, "swap_labels is for losses on pairs"),
        (DPOConfig, {"loss_type": ["lair", "sigmoid"]}, "loss_type"),
        (DPOConfig, {"loss_type": "lair", "label_smoothing": 0.1}, "label_smoothing is for losses on pairs"),
        (DPOConfig, {"loss_type": "sft", "margin_dropout": 0.5}, "margin_dropout weakens the rejected image, which"),
        (DPOConfig, {"loss_type": "mapo", "reference": "ema"}, "reference ema: loss_type mapo has no reference"),
        (DPOConfig, {"linear_eta": 0.1}, "linear_eta is an option of loss_type linear, found sigmoid"),
        (DPOConfig, {"list_advantage": "score"}, "list_advantage is an option of loss_type lair and dgpo"),
        (DPOConfig, {"swap_labels": None}, "swap_labels null exchanges the pairs whose caption is dropped"),
        (DPOConfig, {"reference": "ema", "full_finetuning": True}, "reference ema keeps a second set"),
        (DPOConfig, {"reference": "sync", "lora_dropout": 0.1}, "reference sync is asked without dropout"),
        (DPOConfig, {"reference": "ema", "reference_cache": True, "noise_draws": 2, "cache_dir": "x"},
         "reference_cache remembers what a frozen reference says"),
        (DPOConfig, {"loss_type": "lair", "reference_cache": True, "noise_draws": 2, "cache_dir": "x"},
         "reference_cache remembers errors of pairs"),
        (DPOConfig, {"curriculum": "label", "streaming": True}, "orders all pairs, which streaming does not"),
        (InPOConfig, {"curriculum": "label", "aspect_ratio_buckets": True}, "which aspect_ratio_buckets does not"),
        (SFTConfig, {"timestep_density": "late", "timesteps": [3, 5]}, "timestep_density late needs a range"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_one_error(cls: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(cls, values, "recipe")
