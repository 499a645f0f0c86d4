"""The loss of a batch against the published formulas, computed by hand in float64 with plain diffusers modules."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.adapters.prompts import conditioning
from diffusion_align.data import PairBatch, PairLoader, PairTransform, PixelExamples, load_pairs
from diffusion_align.training.engine.randomness import (
    CHOSEN_POSTERIOR,
    NOISE,
    REJECTED_POSTERIOR,
    TIMESTEP,
    generators,
    normal,
)
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.pairs.noising import GaussianNoising, InvertedNoising

BETA = 20.0


def policy(folder: Path, full: bool = False) -> Adapter:
    """A policy that has moved away from its reference."""
    adapter = load_adapter(folder)
    adapter.train_full() if full else adapter.train_lora(rank=4)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.trainable_parameters().values():
        parameter.data += (0.02 if full else 0.1) * torch.randn(parameter.shape, generator=generator)
    return adapter


def loaded(folder: Path, batch_size: int) -> PairLoader:
    pairs: Any = load_pairs(folder)
    return PairLoader(PixelExamples(pairs, PairTransform(64)), batch_size, caption_dropout=0.3)


@pytest.fixture
def loader(pairs_folder: Path) -> PairLoader:
    return loaded(pairs_folder, 6)


@pytest.fixture
def few(pairs_folder: Path) -> PairLoader:
    """For what is done pair by pair, or again and again."""
    return loaded(pairs_folder, 3)


def double_unets(adapter: Adapter) -> tuple[Any, Any]:
    """Policy and reference UNet in float64, the adapters merged or dropped: no switch is left to trust."""
    trained, frozen = copy.deepcopy(adapter.unet), copy.deepcopy(adapter.unet)
    if adapter.is_lora:
        trained.fuse_lora()
        trained.unload_lora()
        frozen.unload_lora()
    else:
        frozen = copy.deepcopy(adapter._reference_network)
    return trained.double(), frozen.double()


class ByHand:
    """Everything both methods need, from the batch's pixels and seeds."""

    def __init__(self, adapter: Adapter, batch: PairBatch) -> None:
        assert batch.pixels is not None
        posterior = adapter.vae.encode(batch.pixels.flatten(0, 1)).latent_dist
        shape = posterior.mean.shape[1:]
        draws = torch.cat([normal(batch.seeds, stream, shape) for stream in (CHOSEN_POSTERIOR, REJECTED_POSTERIOR)])
        scale = adapter.vae.config.scaling_factor
        self.x0 = ((posterior.mean + posterior.std * draws) * scale).double().detach()
        self.t = torch.cat(
            [torch.randint(1000, (1,), generator=each) for each in generators(batch.seeds, TIMESTEP)]
        ).repeat(2)
        self.alpha_bar = adapter.pipeline.scheduler.alphas_cumprod.double()
        self.eps = normal(batch.seeds, NOISE, shape).repeat(2, 1, 1, 1).double()
        self.v_prediction = adapter.pipeline.scheduler.config.prediction_type == "v_prediction"
        self.arguments = self._arguments(adapter, batch)

    def _arguments(self, adapter: Adapter, batch: PairBatch) -> dict[str, Any]:
        pipeline, encoded = adapter.pipeline, []
        for caption in batch.captions:
            if hasattr(pipeline, "text_encoder_2"):
                embeds, null, pooled, null_pooled = pipeline.encode_prompt(caption or "", device="cpu")
                encoded.append((null, null_pooled) if caption is None else (embeds, pooled))
            else:
                encoded.append((pipeline.encode_prompt(caption or "", "cpu", 1, False)[0], torch.zeros(1, 1)))
        embeds, pooled = (
            torch.cat([row[i] for row in encoded]).repeat(2, *[1] * d).double() for i, d in ((0, 2), (1, 1))
        )
        arguments: dict[str, Any] = {"encoder_hidden_states": embeds}
        if hasattr(pipeline, "text_encoder_2"):
            time_ids = batch.size_ids[0].repeat(2, 1).double()  # of the chosen image, for both
            arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
        return arguments

    def level(self, t: Tensor) -> Tensor:
        return self.alpha_bar[t].view(-1, 1, 1, 1)

    def error(self, unet: Any, eps: Tensor) -> Tensor:
        """Per-sample error of the raw output at the latents that ``eps`` leads to."""
        ab = self.level(self.t)
        x_t = ab.sqrt() * self.x0 + (1 - ab).sqrt() * eps
        target = ab.sqrt() * eps - (1 - ab).sqrt() * self.x0 if self.v_prediction else eps
        with torch.no_grad():
            output = unet(x_t, self.t, **self.arguments).sample
        return ((output - target) ** 2).mean(dim=(1, 2, 3))

    def loss(self, trained: Any, frozen: Any, eps: Tensor) -> Tensor:
        """Diffusion-DPO, eq. 14, with T and omega folded into beta and the official factor 0.5."""
        (w, l), (rw, rl) = (self.error(unet, eps).chunk(2) for unet in (trained, frozen))  # noqa: E741
        return -torch.nn.functional.logsigmoid(-0.5 * BETA * ((w - rw) - (l - rl))).mean()

    def invert(self, unet: Any, steps: int) -> Tensor:
        """Ten DDIM steps backwards, sample by sample, and the noise they amount to."""
        results = []
        for i, end in enumerate(self.t.tolist()):
            row = {"encoder_hidden_states": self.arguments["encoder_hidden_states"][i : i + 1]}
            if "added_cond_kwargs" in self.arguments:
                row["added_cond_kwargs"] = {k: v[i : i + 1] for k, v in self.arguments["added_cond_kwargs"].items()}
            x, before = self.x0[i : i + 1], 1.0
            for k in range(1, steps + 1):
                t = end * k // steps
                after = float(self.alpha_bar[t])
                with torch.no_grad():
                    eps = unet(x, torch.tensor([t]), **row).sample
                if self.v_prediction:
                    eps = after**0.5 * eps + (1 - after) ** 0.5 * x
                clean = (x - (1 - before) ** 0.5 * eps) / before**0.5
                x, before = after**0.5 * clean + (1 - after) ** 0.5 * eps, after
            results.append((x - before**0.5 * self.x0[i : i + 1]) / (1 - before) ** 0.5)
        return torch.cat(results)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["sdxl_folder", "sd_folder", "sd_v_folder"])
def test_dpo_loss_is_the_published_one(
    family: str, full: bool, loader: PairLoader, request: pytest.FixtureRequest
) -> None:
    adapter, batch = policy(request.getfixturevalue(family), full), loader.load(0)
    method = PairMethod(DPOConfig(beta=BETA), adapter, loader, GaussianNoising(adapter))
    hand = ByHand(adapter, batch)
    expected = hand.loss(*double_unets(adapter), hand.eps).item()
    assert method.loss(batch)[0].item() == pytest.approx(expected, abs=1e-5)
    assert abs(expected - 0.6931) > 1e-3


def pictures_of_sizes(folder: Path) -> Path:
    """Six pairs whose images have other sizes and shapes."""
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        for side in ("chosen", "rejected"):
            size = tuple(int(each) for each in rng.integers(70, 130, 2))
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{side}{i}.png")
        rows.append({"chosen": f"chosen{i}.png", "rejected": f"rejected{i}.png", "caption": f"number {i}"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.mark.parametrize("size_ids", ["pair", "own", "resolution"])
def test_sdxl_is_told_the_sizes_that_are_asked_for(size_ids: Any, sdxl_folder: Path, tmp_path: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    config = DPOConfig(dataset=str(pictures_of_sizes(tmp_path)), per_device_train_batch_size=6, size_ids=size_ids)
    source = build_pair_source(config, adapter)
    batch = next(iter(source))
    expected = []
    for side in ("chosen", "rejected"):
        for caption, flip in zip(batch.captions, flips(batch), strict=True):
            assert caption is not None
            shown = "chosen" if size_ids == "pair" else side
            with Image.open(tmp_path / f"{shown}{caption.removeprefix('number ')}.png") as image:
                width, height = image.size
            full = [round(each * max(64 / width, 64 / height)) for each in (height, width)]
            top, left = (round(0.5 * (each - 64)) for each in full)
            left = full[1] - 64 - left if flip else left
            expected.append([64, 64, 0, 0, 64, 64] if size_ids == "resolution" else [height, width, top, left, 64, 64])
    cond = PairMethod(config, adapter, source, GaussianNoising(adapter)).conditioning(batch)
    assert cond.time_ids is not None
    assert cond.time_ids.tolist() == expected


def flips(batch: PairBatch) -> list[bool]:
    return [np.random.default_rng(seed % 2**64).random(3)[2] < 0.5 for seed in batch.seeds.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("null_prompt", ["pipeline", "encoded"])
def test_dropped_captions_are_the_pipeline_s_null_prompt_or_the_encoded_empty_one(
    null_prompt: Any, sdxl_folder: Path, pairs_folder: Path
) -> None:
    adapter = policy(sdxl_folder)
    config = DPOConfig(
        beta=BETA, dataset=str(pairs_folder), per_device_train_batch_size=6, caption_dropout=1.0,
        null_prompt=null_prompt, dataloader_num_workers=0,
    )  # fmt: skip
    source = build_pair_source(config, adapter)
    batch = next(iter(source))
    assert batch.captions == [{"pipeline": None, "encoded": ""}[null_prompt]] * 6
    hand = ByHand(adapter, batch)
    assert hand.arguments["encoder_hidden_states"].any() == (null_prompt == "encoded")
    loss, _ = PairMethod(config, adapter, source, GaussianNoising(adapter)).loss(batch)
    assert loss.item() == pytest.approx(hand.loss(*double_unets(adapter), hand.eps).item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("inversion_model", ["policy", "reference"])
@pytest.mark.parametrize("family", ["sdxl_folder", "sd_v_folder"])
def test_inpo_loss_is_the_published_one(
    family: str, inversion_model: Any, few: PairLoader, request: pytest.FixtureRequest
) -> None:
    adapter, batch = policy(request.getfixturevalue(family)), few.load(0)
    config = InPOConfig(beta=BETA, inversion_steps=4, inversion_eta=0.0, inversion_model=inversion_model)
    method = PairMethod(config, adapter, few, InvertedNoising(adapter, config))
    hand = ByHand(adapter, batch)
    trained, frozen = double_unets(adapter)
    tau = hand.invert(trained if inversion_model == "policy" else frozen, steps=4)
    expected = hand.loss(trained, frozen, tau).item()
    assert method.loss(batch)[0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_fresh_noise_of_inversion_is_of_each_image_or_of_the_pair(shared: bool, sd_folder: Path) -> None:
    adapter = load_adapter(sd_folder)
    config = InPOConfig(inversion_steps=2, inversion_eta=0.5, shared_noise=shared)
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))  # of two pairs of twice the same image
    seeds, t = torch.tensor([3, 4]), torch.tensor([600, 700])
    cond = conditioning(adapter, ["a", "b"] * 2, 64, 64, None)
    x_t, _ = InvertedNoising(adapter, config)(image.repeat(2, 1, 1, 1), t.repeat(2), cond, seeds)
    chosen, rejected = x_t.chunk(2)
    assert torch.allclose(chosen, rejected, atol=1e-5) == shared
    assert not torch.allclose(chosen[0] - image[0], chosen[1] - image[1], atol=1e-2)  # pairs differ either way


def test_remembered_reference_errors_are_of_one_kind_of_fresh_noise() -> None:
    own, shared = (InPOConfig(shared_noise=value).reference_settings() for value in (False, True))
    assert shared == {**own, "shared_noise": True}
    assert "shared_noise" not in own  # files from before the setting are found


def test_shared_noise_without_fresh_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="shared_noise is about the fresh noise of inversion_eta, which is 0"):
        InPOConfig(inversion_eta=0.0, shared_noise=True).check()


@pytest.mark.slow
def test_gradient_is_that_of_the_formula(sd_folder: Path, loader: PairLoader) -> None:
    adapter, batch = policy(sd_folder, full=True), loader.load(0)
    method = PairMethod(DPOConfig(beta=BETA), adapter, loader, GaussianNoising(adapter))
    method.loss(batch)[0].backward()
    hand = ByHand(adapter, batch)
    name, parameter = next((n, p) for n, p in adapter.trainable_parameters().items() if n.endswith("to_q.weight"))
    assert parameter.grad is not None
    trained, frozen = double_unets(adapter)
    moved = dict(trained.named_parameters())[name]
    direction = torch.randn(moved.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = []
    for step in (1e-5, -1e-5):
        moved.data += step * direction
        values.append(hand.loss(trained, frozen, hand.eps).item())
        moved.data -= step * direction
    slope = (values[0] - values[1]) / 2e-5
    assert (parameter.grad.double() * direction).sum().item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_an_untrained_policy_is_indifferent(sdxl_folder: Path, loader: PairLoader) -> None:
    adapter = load_adapter(sdxl_folder).train_lora(rank=4)
    method = PairMethod(DPOConfig(beta=5000.0), adapter, loader, GaussianNoising(adapter))
    loss, metrics = method.loss(loader.load(0))
    assert loss.item() == pytest.approx(0.693147, abs=1e-6)
    assert metrics["margin"].item() == 0


def test_chosen_and_rejected_share_noise_and_timestep(sdxl_folder: Path, loader: PairLoader) -> None:
    adapter = load_adapter(sdxl_folder)
    x0, seeds = torch.zeros(4, 4, 16, 16), torch.tensor([1, 2])
    _, eps = GaussianNoising(adapter)(x0, torch.tensor([10, 900, 10, 900]), adapter.null_conditioning(4), seeds)
    assert torch.equal(eps[:2], eps[2:])
    assert not torch.equal(eps[0], eps[1])


@pytest.mark.slow
def test_a_batch_can_be_learned(sdxl_folder: Path, few: PairLoader) -> None:
    """That real policies get better is measured in benchmarks/results/scenes_dpo_inpo.json."""
    adapter, batch = load_adapter(sdxl_folder).train_lora(rank=8), few.load(0)
    method = PairMethod(DPOConfig(beta=500.0), adapter, few, GaussianNoising(adapter))
    optimizer = torch.optim.AdamW(adapter.trainable_parameters().values(), lr=6e-3)
    for _ in range(12):
        loss, metrics = method.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    assert metrics["implicit_accuracy"].item() == 1
