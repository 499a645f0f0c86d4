"""Lists and labelled pictures: batches against straight lines, and runs on pairs as either."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_align.adapters import Adapter
from diffusion_align.data import PairBatch
from diffusion_align.training.engine.randomness import CHOSEN_POSTERIOR, NOISE, TIMESTEP, generators, normal
from diffusion_align.training.pairs.beyond_pairs.by_caption import ByCaption, build_order
from diffusion_align.training.pairs.beyond_pairs.config import KTOConfig
from diffusion_align.training.pairs.beyond_pairs.label_means import LabelMeans
from diffusion_align.training.pairs.beyond_pairs.labelled import LabelledMethod, labelled
from diffusion_align.training.pairs.beyond_pairs.lists import ListMethod
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.pairs.job import drawn_noise
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.run import train

from .test_pair_loss import double_unets, policy

BETA = 500.0


@pytest.fixture(scope="module")
def adapter(sd_folder: Path) -> Adapter:
    return policy(sd_folder)


@pytest.fixture(scope="module")
def batch(adapter: Adapter, pairs_folder: Path) -> PairBatch:
    """Four pairs."""
    config = DPOConfig(dataset=str(pairs_folder), per_device_train_batch_size=4, dataloader_num_workers=0)
    return next(iter(build_pair_source(config, adapter)))


def errors_by_hand(adapter: Adapter, pictures: PairBatch) -> np.ndarray:
    """Errors (2, B) in float64 of policy and reference on single pictures, each with noise of its own."""
    assert pictures.pixels is not None
    posterior = adapter.vae.encode(pictures.pixels[0]).latent_dist
    shape = posterior.mean.shape[1:]
    x0 = (posterior.mean + posterior.std * normal(pictures.seeds, CHOSEN_POSTERIOR, shape)).double().detach()
    x0 = x0 * adapter.vae.config.scaling_factor
    t = torch.cat([torch.randint(1000, (1,), generator=each) for each in generators(pictures.seeds, TIMESTEP)])
    eps = normal(pictures.seeds, NOISE, shape).double()
    signal = adapter.pipeline.scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * eps
    embeds = torch.cat([adapter.pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in pictures.captions])
    found = []
    for unet in double_unets(adapter):
        with torch.no_grad():
            output = unet(x_t, t, encoder_hidden_states=embeds.double()).sample
        found.append(((output - eps) ** 2).mean(dim=(1, 2, 3)).numpy())
    return np.stack(found)


@pytest.fixture(scope="module")
def errors(adapter: Adapter, batch: PairBatch) -> np.ndarray:
    return errors_by_hand(adapter, labelled(batch, None))


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_the_loss_of_labelled_pictures_is_the_published_one(
    loss_type: Any, adapter: Adapter, batch: PairBatch, errors: np.ndarray
) -> None:
    config = KTOConfig(loss_type=loss_type, beta=BETA, desirable_weight=1.25)
    method = LabelledMethod(config, adapter, None, drawn_noise(config, adapter))  # type: ignore[arg-type]
    pictures = labelled(batch, None)
    assert len(set(pictures.seeds.tolist())) == 8
    loss, metrics = method.loss(batch)
    e, f = errors
    r, y = BETA / 2 * (f - e), np.array([1.0] * 4 + [-1.0] * 4)
    w = np.where(y > 0, 1.25, 1.0)
    if loss_type == "kto":
        expected = np.mean(w * (1 - 1 / (1 + np.exp(-y * (r - max(0.0, r.mean()))))))
    else:
        delta = (r[:4].mean() + r[4:].mean()) / 2
        expected = np.mean(w * np.log1p(np.exp(-y * (r - delta))))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["rewards/chosen"].item() == pytest.approx(r[:4].mean(), abs=1e-3)
    assert metrics["margin"].item() == pytest.approx(r[:4].mean() - r[4:].mean(), abs=1e-3)
    assert metrics["error_rejected"].item() == pytest.approx(e[4:].mean(), rel=1e-4)
    assert metrics["chosen_error_up"].item() == pytest.approx((r[:4] < 0).mean())


def test_a_share_of_liked_pictures_is_drawn_from_pairs(batch: PairBatch) -> None:
    many = replace(batch.rows([0] * 400), seeds=torch.arange(400))
    drawn = labelled(many, 0.8)
    assert drawn.label is not None
    assert len(drawn) == 400
    assert (drawn.label > 0).float().mean().item() == pytest.approx(0.8, abs=0.06)
    again = labelled(many, 0.8)
    assert again.label is not None
    assert torch.equal(drawn.label, again.label)
    assert drawn.pixels is not None
    assert batch.pixels is not None
    for i in range(10):
        assert torch.equal(drawn.pixels[0, i], batch.pixels[0 if drawn.label[i] > 0 else 1, 0])
    single = replace(many.rows([0]), label=torch.ones(1))
    assert labelled(single, None) is single
    with pytest.raises(ValueError, match="positive_ratio takes one image of each pair"):
        labelled(single, 0.5)


def test_shared_noise_is_that_of_the_caption(batch: PairBatch) -> None:
    of_pairs = labelled(batch, None, shared_noise=True)
    assert of_pairs.seeds.tolist() == batch.seeds.tolist() * 2
    pictures = replace(labelled(batch, None), captions=["a", "b", "a", None, "b", "", "", "a"])
    own, shared = pictures.seeds.tolist(), labelled(pictures, None, shared_noise=True).seeds.tolist()
    assert shared == [own[i] for i in (0, 1, 0, 3, 1, 5, 6, 0)]  # pictures without caption keep theirs
    assert labelled(pictures, None).seeds.tolist() == own


def test_pictures_of_a_caption_stand_together_and_come_once_an_epoch() -> None:
    captions = [f"caption {i % 5}" for i in range(17)]
    order = ByCaption(captions, seed=3)
    epochs = [[order(17 * epoch + place) for place in range(17)] for epoch in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(17))
        assert len(list(itertools.groupby(captions[row] for row in rows))) == 5
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == [ByCaption(captions, seed=3)(17 + place) for place in range(17)]  # also of a resumed run
    assert epochs[0] != [ByCaption(captions, seed=4)(place) for place in range(17)]
    with pytest.raises(ValueError, match="no two of these 3 have the same: set shared_noise to false"):
        ByCaption(["a", "b", "c"], seed=3)


@pytest.fixture
def thumbs(tmp_path: Path) -> Path:
    """Twelve labelled pictures of four captions, none beside another of its caption."""
    folder = tmp_path / "thumbs"
    folder.mkdir()
    lines = []
    for i in range(12):
        Image.new("RGB", (64, 64), (20 * i, 99, 0)).save(folder / f"{i}.png")
        lines.append(
            {"file_name": f"{i}.png", "caption": f"caption {i % 4}", "label": ["liked", "disliked"][i % 3 > 0]}
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("cached", [False, True])
def test_labelled_pictures_of_a_caption_meet_in_a_batch(
    adapter: Adapter, thumbs: Path, tmp_path: Path, cached: bool
) -> None:
    config = KTOConfig(
        dataset=str(thumbs), shared_noise=True, per_device_train_batch_size=6, dataloader_num_workers=0,
        cache_dir=str(tmp_path / "cache") if cached else None,
    )  # fmt: skip
    config.check()
    for batch in itertools.islice(build_pair_source(config, adapter, order=partial(build_order, config)), 4):
        shared = labelled(batch, None, shared_noise=True)
        assert len(set(shared.captions)) == len(set(shared.seeds.tolist())) == 2  # two whole captions of three
    plain = replace(config, shared_noise=False)
    found = itertools.islice(build_pair_source(plain, adapter, order=partial(build_order, plain)), 4)
    assert max(len(set(batch.captions)) for batch in found) > 2


def test_shared_noise_that_could_not_be_shared_is_refused(adapter: Adapter, thumbs: Path, pairs_folder: Path) -> None:
    with pytest.raises(ValueError, match="positive_ratio takes one of each pair"):
        KTOConfig(shared_noise=True, positive_ratio=0.8).check()
    for name in ("streaming", "aspect_ratio_buckets"):
        settings: dict[str, Any] = {"shared_noise": True, name: True}
        with pytest.raises(ValueError, match=f"labelled pictures of a caption together, which {name} does not"):
            KTOConfig(dataset=str(thumbs), **settings).check()
        KTOConfig(dataset=str(pairs_folder), **settings).check()  # a pair's two are together anyway
    config = KTOConfig(dataset=str(thumbs), shared_noise=True, streaming=True)  # unknown before it is read, on the hub
    with pytest.raises(ValueError, match="which streaming does not"):
        build_pair_source(config, adapter, order=partial(build_order, config))


def test_means_by_label_are_exponential_averages_over_pictures() -> None:
    means = LabelMeans(2, 0.9, "cpu")
    rng, past = np.random.default_rng(0), []
    for step in range(6):
        label = rng.choice([1.0, -1.0], size=3) if step else np.ones(3)
        values = rng.standard_normal((2, 3))
        past.append((values, label))
        means.update(torch.tensor(values), torch.tensor(label))
        expected = np.zeros((2, 2))
        weights = np.zeros(2)
        for age, (old, which) in enumerate(reversed(past)):
            for side, sign in enumerate((1.0, -1.0)):
                expected[side] += 0.9**age * old[:, which == sign].sum(axis=1)
                weights[side] += 0.9**age * (which == sign).sum()
        assert means.overall(1).item() == pytest.approx(expected[:, 1].sum() / weights.sum(), rel=1e-5)
        seen = weights > 0
        by_label = expected[seen] / weights[seen, None]
        assert means.means[torch.tensor(seen)].numpy() == pytest.approx(by_label, rel=1e-5)
        assert means.balanced(1).item() == pytest.approx(by_label[:, 1].mean(), rel=1e-5)
    before = means.overall(0).item()
    means.update(torch.tensor([[math.nan], [1.0]]), torch.ones(1))
    assert means.overall(0).item() == before
    other = LabelMeans(2, 0.9, "cpu")
    other.load_state_dict(means.state_dict())
    assert other.balanced(0) == means.balanced(0)


@pytest.mark.slow
def test_pairs_as_lists_of_two_train_like_pairs(adapter: Adapter, batch: PairBatch) -> None:
    def found(method: Any, **settings: Any) -> tuple[float, dict[str, Any]]:
        config = DPOConfig(beta=BETA, sft_weight=0.5, **settings)
        loss, metrics = method(config, adapter, None, drawn_noise(config, adapter)).loss(batch)
        return loss.item(), metrics

    (pair, other), (ranked, metrics) = found(PairMethod), found(ListMethod, loss_type="plackett_luce")
    assert ranked == pytest.approx(pair, rel=1e-6)
    for name in ("margin", "implicit_accuracy", "error_chosen", "rewards/rejected", "chosen_error_up", "moved"):
        assert metrics[name].item() == pytest.approx(other[name].item(), rel=1e-5), name
    assert found(ListMethod, loss_type="lair")[0] == pytest.approx(
        found(PairMethod, loss_type="sppo_hard")[0], rel=1e-5
    )


@pytest.mark.slow
def test_lists_of_three_are_compared_at_one_noise(adapter: Adapter, batch: PairBatch) -> None:
    """Plackett-Luce by hand of three pictures a prompt, one of which is missing in the first list."""
    assert batch.pixels is not None
    mean, _ = adapter.encode_posterior(batch.pixels.flatten(0, 1))
    latents = torch.cat([mean, mean[:4].flip(0)]).unflatten(0, (3, 4))
    rank = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 0, 1], [2, 1, 0]])
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, 2] = False
    lists = replace(
        batch, pixels=None, posterior=(latents, torch.zeros_like(latents)), rank=rank, mask=mask,
        size_ids=batch.size_ids[:1].expand(3, 4, 6),
    )  # fmt: skip
    config = DPOConfig(beta=BETA, loss_type="plackett_luce")
    method = ListMethod(config, adapter, None, drawn_noise(config, adapter))  # type: ignore[arg-type]
    loss, metrics = method.loss(lists)
    noisy = method.noisy(lists, lists.seeds)
    assert noisy.t.view(3, 4).unique(dim=0).shape[0] == 1
    assert noisy.target.unflatten(0, (3, 4)).unique(dim=0).shape[0] == 1
    with torch.no_grad():
        e = noisy.errors(adapter).view(3, 4).T.double()
    with adapter.reference():
        r = BETA / 2 * (noisy.errors(adapter).view(3, 4).T.double() - e)
    total = []
    for i in range(4):
        there = [k for k in range(3) if mask[i, k]]
        terms = []
        for k in there:
            worse = [j for j in there if rank[i, j] > rank[i, k]]
            if worse:
                terms.append(float(torch.logsumexp(r[i, [k, *worse]], 0) - r[i, k]))
        total.append(sum(terms) / len(terms))
    assert loss.item() == pytest.approx(np.mean(total), rel=1e-4)
    assert metrics["error_chosen"].item() == pytest.approx(
        np.mean([e[0, 1], e[1, 0], e[2, 1], e[3, 2]]), rel=1e-5
    )  # fmt: skip


@pytest.mark.slow
def test_soft_labels_are_scores_of_lists_or_refused(adapter: Adapter, batch: PairBatch) -> None:
    soft = replace(batch, preference=torch.tensor([0.9, 1.0, 0.6, 1.0]))

    def found(**settings: Any) -> float:
        config = DPOConfig(beta=BETA, **settings)
        method = ListMethod(config, adapter, None, drawn_noise(config, adapter))  # type: ignore[arg-type]
        return method.loss(soft)[0].item()

    with pytest.raises(ValueError, match="loss_type lair sees the order of soft labels only"):
        found(loss_type="lair")
    hard = replace(soft, preference=torch.ones(4))
    config = DPOConfig(beta=BETA, loss_type="lair")
    method = ListMethod(config, adapter, None, drawn_noise(config, adapter))  # type: ignore[arg-type]
    assert found(loss_type="lair", list_advantage="score") != pytest.approx(method.loss(hard)[0].item(), rel=1e-3)


@pytest.fixture
def run(sdxl_folder: Path, pairs_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(sdxl_folder), "dataset": str(pairs_folder), "output_dir": str(tmp_path / "run"), "max_steps": 2,
        "save_steps": 1, "learning_rate": 1e-2, "beta": 500.0, "lora_rank": 2, "logging_steps": 1, "report_to": "none",
        "progress": False, "save_total_limit": 5,
    }  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_on_labelled_pictures_is_bit_for_bit_one_run(run: dict[str, Any], tmp_path: Path) -> None:
    config = KTOConfig(**run, loss_type="bco", reference="ema")
    one = train(config)
    middle = str(tmp_path / "run" / "checkpoint-00000001")
    again = train(replace(config, output_dir=str(tmp_path / "again"), resume_from_checkpoint=middle))
    assert [line["loss"] for line in again.history] == [line["loss"] for line in one.history[1:]]
    for name in ("policy", "method"):
        files = [tmp_path / folder / f"checkpoint-00000002/{name}.safetensors" for folder in ("run", "again")]
        first, second = (load_file(file) for file in files)
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert one.history[-1]["frozen/moved"] > 0
    assert any(name.startswith("kl_data/t") for name in one.history[-1])


@pytest.mark.slow
def test_a_run_on_lists_and_its_plan(run: dict[str, Any]) -> None:
    config = DPOConfig(**run | {"max_steps": 1}, loss_type="dgpo")
    first = train(config).history[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert any(name.startswith("reward_rejected/t") for name in first)
    drawn, both = (KTOConfig(**run, positive_ratio=ratio).work() for ratio in (0.5, None))
    assert (drawn.trained, both.trained) == (1, 2)
    assert (drawn.forward, both.forward) == ({"reference": 1}, {"reference": 2})
