"""Methods on data sets with flow models: losses by hand, InPO by inversion of the ODE, every loss, runs, refusals."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AuraFlowPipeline, FluxPipeline
from torch import Tensor

from diffusion_align import load_adapter
from diffusion_align.adapters import Adapter
from diffusion_align.data import PairBatch
from diffusion_align.objectives.losses.loss_tables import LIST_LOSSES
from diffusion_align.objectives.preference import PREFERENCE_LOSSES
from diffusion_align.training.engine.randomness import (
    CHOSEN_POSTERIOR,
    NOISE,
    REJECTED_POSTERIOR,
    TIMESTEP,
    generators,
    normal,
)
from diffusion_align.training.pairs.beyond_pairs.config import KTOConfig
from diffusion_align.training.pairs.beyond_pairs.labelled import LabelledMethod
from diffusion_align.training.pairs.beyond_pairs.lists import ListMethod
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig
from diffusion_align.training.pairs.job import drawn_noise
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.pairs.noising import InvertedNoising
from diffusion_align.training.run import train
from tests.adapters.families.tiny_flow import LENGTH

BETA, SIDE = 100.0, 32
COMMON: dict[str, Any] = {
    "resolution": SIDE, "per_device_train_batch_size": 3, "caption_dropout": 0.3, "dataloader_num_workers": 0,
    "max_sequence_length": LENGTH,
}  # fmt: skip


def policy(folder: Path, moved: float = 0.1) -> Adapter:
    """A policy that has moved away from its reference."""
    torch.manual_seed(3)
    adapter = load_adapter(folder, max_sequence_length=LENGTH).train_lora(rank=2)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.trainable_parameters().values():
        parameter.data += moved * torch.randn(parameter.shape, generator=generator)
    return adapter


@pytest.fixture(scope="module")
def sd3(sd3_folder: Path) -> Adapter:
    return policy(sd3_folder)


@pytest.fixture(scope="module")
def flux(flux_folder: Path) -> Adapter:
    return policy(flux_folder)


@pytest.fixture(scope="module")
def auraflow(auraflow_folder: Path) -> Adapter:
    return policy(auraflow_folder, moved=0.5)  # its blocks' norms take most of a change back


@pytest.fixture(scope="module")
def batch(sd3: Adapter, pairs_folder: Path) -> PairBatch:
    return next(iter(build_pair_source(DPOConfig(dataset=str(pairs_folder), **COMMON), sd3)))


def networks(adapter: Adapter) -> tuple[Any, Any]:
    """Policy and reference in float64, the LoRA merged or dropped."""
    trained, frozen = copy.deepcopy(adapter.network), copy.deepcopy(adapter.network)
    trained.fuse_lora()
    trained.unload_lora()
    frozen.unload_lora()
    return trained.double(), frozen.double()


def errors_by_hand(adapter: Adapter, batch: PairBatch, guidance: float) -> np.ndarray:
    """Errors (2, 2 B): policy and reference, on chosen and rejected pictures, by plain diffusers modules."""
    assert batch.pixels is not None
    pipeline, config = adapter.pipeline, adapter.vae.config
    posterior = adapter.vae.encode(batch.pixels.flatten(0, 1)).latent_dist
    shape = posterior.mean.shape[1:]
    draws = torch.cat([normal(batch.seeds, stream, shape) for stream in (CHOSEN_POSTERIOR, REJECTED_POSTERIOR)])
    shift = config.shift_factor or 0.0
    x0 = ((posterior.mean + posterior.std * draws - shift) * config.scaling_factor).double().detach()
    eps = normal(batch.seeds, NOISE, shape).repeat(2, 1, 1, 1).double()
    u = torch.cat([torch.rand(1, generator=each, dtype=torch.float64) for each in generators(batch.seeds, TIMESTEP)])
    flux, auraflow = isinstance(pipeline, FluxPipeline), isinstance(pipeline, AuraFlowPipeline)
    offset = 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256) if flux else math.log(pipeline.scheduler.config.shift)
    sigma = torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * u - 1) + offset).repeat(2)
    at = sigma.view(-1, 1, 1, 1)
    x_t = (1 - at) * x0 + at * eps
    texts = [caption or "" for caption in batch.captions] * 2
    found = []
    for network in networks(adapter):
        with torch.no_grad():
            if flux:
                embeds, pooled, ids = pipeline.encode_prompt(texts, max_sequence_length=LENGTH)
                packed = FluxPipeline._pack_latents(x_t, len(x_t), 4, 8, 8)
                places = FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
                output = network(
                    packed, embeds.double(), pooled.double(), sigma, places, ids, torch.full((len(x_t),), guidance)
                ).sample
                output = FluxPipeline._unpack_latents(output, 8, 8, 1)
            elif auraflow:
                embeds, *_ = pipeline.encode_prompt(texts, max_sequence_length=LENGTH)
                output = network(x_t, embeds.double(), sigma).sample
            else:
                embeds, _, pooled, _ = pipeline.encode_prompt(texts, None, None, max_sequence_length=LENGTH)
                output = network(x_t, embeds.double(), pooled.double(), 1000 * sigma).sample
        found.append((output - (eps - x0)).square().mean(dim=(1, 2, 3)).numpy())
    return np.stack(found)


@pytest.mark.parametrize(("family", "guidance"), [("sd3", 1.0), ("flux", 1.0), ("flux", 3.5), ("auraflow", 1.0)])
def test_the_loss_of_pairs_is_dpos_on_errors_of_the_flow(
    family: str, guidance: float, batch: PairBatch, request: pytest.FixtureRequest
) -> None:
    adapter = request.getfixturevalue(family)
    config = DPOConfig(beta=BETA, train_guidance=guidance, **COMMON)
    method = PairMethod(config, adapter, None, drawn_noise(config, adapter))  # type: ignore[arg-type]
    loss, metrics = method.loss(batch)
    (e_w, e_l), (f_w, f_l) = (row.reshape(2, -1) for row in errors_by_hand(adapter, batch, guidance))
    logits = -0.5 * BETA * ((e_w - f_w) - (e_l - f_l))
    assert np.abs(logits).max() > 0.1
    assert loss.item() == pytest.approx(np.log1p(np.exp(-logits)).mean(), rel=1e-3)
    assert any(name.startswith("chosen_error_up/") for name in metrics)
    assert metrics["abs_margin"].item() == pytest.approx(np.abs(logits).mean(), rel=1e-3)
    assert metrics["gradient_factor"].item() == pytest.approx((1 / (1 + np.exp(logits))).mean(), rel=1e-3)
    loss.backward()
    trained = adapter.trainable_parameters()
    still = [name for name, p in trained.items() if "lora_B" in name and (p.grad is None or not p.grad.any())]
    # What SD3's last block asks of pictures for the text is never looked at.
    assert all("transformer_blocks.1.attn.add_q_proj" in name for name in still), still
    adapter.network.zero_grad()


def test_every_loss_of_pairs_lists_and_pictures_takes_a_flow_model(sd3: Adapter, batch: PairBatch) -> None:
    options = {"linear": {"linear_eta": 0.001}}
    for name in PREFERENCE_LOSSES:
        config = DPOConfig(loss_type=name, beta=BETA, **options.get(name, {}), **COMMON)  # type: ignore[arg-type]
        method = PairMethod(config, sd3, None, drawn_noise(config, sd3))  # type: ignore[arg-type]
        assert method.loss(batch)[0].isfinite(), name
    for name in LIST_LOSSES:
        config = DPOConfig(loss_type=name, beta=BETA, **COMMON)  # type: ignore[arg-type]
        method = ListMethod(config, sd3, None, drawn_noise(config, sd3))  # type: ignore[assignment, arg-type]
        assert method.loss(batch)[0].isfinite(), name
    for name in ("kto", "bco"):
        kto = KTOConfig(loss_type=name, beta=BETA, **COMMON)  # type: ignore[arg-type]
        labelled = LabelledMethod(kto, sd3, None, drawn_noise(kto, sd3))  # type: ignore[arg-type]
        assert labelled.loss(batch)[0].isfinite(), name


def test_min_snr_weighs_by_the_flows_formula(sd3: Adapter, batch: PairBatch) -> None:
    losses = []
    for weight in ("none", "min-snr"):
        levels: Any = {"timestep_weight": weight, "min_time": 0.5, "max_time": 0.5001}
        config = DPOConfig(loss_type="sft", **levels, **COMMON)
        method = PairMethod(config, sd3, None, drawn_noise(config, sd3))  # type: ignore[arg-type]
        losses.append(method.loss(batch)[0].item())
    assert losses[1] == pytest.approx(losses[0] * 0.25, rel=1e-3)  # min(snr, 5) sigma^2 at sigma = 1/2


def test_inpo_inverts_the_ode(sd3: Adapter, batch: PairBatch) -> None:
    config = InPOConfig(beta=BETA, inversion_steps=3, inversion_eta=0.0, **COMMON)
    method = PairMethod(config, sd3, None, InvertedNoising(sd3, config))  # type: ignore[arg-type]
    noisy, x0 = method.noisy(batch, batch.seeds), method.clean_latents(batch, batch.seeds)
    x, policy_network = x0.double(), networks(sd3)[0]
    with torch.no_grad():
        for k in range(3):
            here, there = (noisy.t.double() * step / 3 for step in (k, k + 1))
            out: Tensor = policy_network(x, noisy.cond.embeds.double(), noisy.cond.pooled.double(), 1000 * there).sample
            x = x + (there - here).view(-1, 1, 1, 1) * out
    torch.testing.assert_close(noisy.x_t, x.float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(noisy.target, (noisy.x_t - x0) / noisy.t.view(-1, 1, 1, 1), rtol=1e-3, atol=1e-3)
    fresh = InPOConfig(beta=BETA, inversion_steps=2, inversion_eta=0.3, renoise_iterations=1, **COMMON)
    other = PairMethod(fresh, sd3, None, InvertedNoising(sd3, fresh))  # type: ignore[arg-type]
    assert other.loss(batch)[0].isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3_folder", "flux_folder", "auraflow_folder"])
def test_a_run_on_a_flow_model_goes_from_cache_to_weights(
    family: str, pairs_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    config = DPOConfig(
        model=str(folder), dataset=str(pairs_folder), cache_dir=str(tmp_path / "cache"), beta=BETA, max_steps=2,
        output_dir=str(tmp_path / "run"), eval_steps=2, num_validation_prompts=2, validation_inference_steps=2,
        validation_guidance_scale=3.5 if family == "flux_folder" else 1.0, kl_prompts=1, save_steps=2, **COMMON,
    )  # fmt: skip
    if family == "flux_folder":  # whose own pictures are of 512 pixels
        config = DPOConfig(**{**vars(config), "eval_steps": 0, "kl_prompts": 0})
    assert train(config).step == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    adapter = load_adapter(folder, max_sequence_length=LENGTH).load_weights(tmp_path / "run")
    names = [str(address.module) for address in adapter.loras.whole()]
    assert any("add_q_proj" in name for name in names)
    assert not any(".attn2." in name for name in names)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("sd3_folder", {"min_timestep": 200}, "min_timestep is for models with timesteps, .*: set min_time"),
        ("sd3_folder", {"min_time": 0.6, "max_time": 0.5}, "min_time = 0.6 must be smaller than max_time = 0.5"),
        ("sd3_folder", {"train_guidance": 3.5}, "train_guidance = 3.5 is for models that take the guidance scale"),
        ("sd3_folder", {"attention": "xformers"}, "attention xformers is for UNets"),
        ("sd3_folder", {"channels_last": True}, "channels_last is for UNets"),
        ("sd3_folder", {"resolution": 36}, "resolution = 36 is not divisible by 8, the VAE factor times the patches"),
        ("sd3_folder", {"prediction_type": "epsilon"}, "prediction_type epsilon: this model is of flow matching"),
        ("flux_folder", {"weight_dtype": "fp16"}, "a flux model leaves the range of fp16: take bf16 or fp32"),
        ("sd_folder", {"shift": 3.0, "max_sequence_length": None}, "shift is for flow models .*: set min_timestep"),
        ("sd_folder", {}, "max_sequence_length = 16 is for models that read prompts with T5"),
    ],
)
def test_settings_of_the_other_kind_of_model_are_refused(
    family: str,
    changes: dict[str, Any],
    message: str,
    pairs_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    settings = {"model": str(request.getfixturevalue(family)), "dataset": str(pairs_folder), **COMMON, **changes}
    with pytest.raises(ValueError, match=message):
        train(DPOConfig(output_dir=str(tmp_path / "run"), **settings))
