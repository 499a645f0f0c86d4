"""Timestep sets, zero terminal SNR, noise offset and input perturbation against straight lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.data import PairBatch, PairLoader, PairTransform, PixelExamples, load_pairs
from diffusion_align.training.engine.randomness import (
    CHOSEN_POSTERIOR,
    NOISE,
    OFFSET,
    PERTURBATION,
    REJECTED_POSTERIOR,
    TIMESTEP,
    generators,
    normal,
)
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig
from diffusion_align.training.pairs.job import drawn_noise
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.pairs.noising import InvertedNoising
from diffusion_align.training.settings import validated


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(sdxl_folder).train_lora(rank=4)


@pytest.fixture(scope="module")
def batch(pairs_folder: Path) -> PairBatch:
    pairs: Any = load_pairs(pairs_folder)
    return PairLoader(PixelExamples(pairs, PairTransform(64)), 6).load(0)


def noisy(adapter: Adapter, batch: PairBatch, **settings: Any) -> Any:
    """What the denoiser of a run with ``settings`` is shown and asked for."""
    config = DPOConfig(**settings)
    return PairMethod(config, adapter, None, drawn_noise(config, adapter)).noisy(batch, batch.seeds)  # type: ignore[arg-type]


def latents(adapter: Adapter, batch: PairBatch) -> Tensor:
    assert batch.pixels is not None
    posterior = adapter.vae.encode(batch.pixels.flatten(0, 1)).latent_dist
    shape = posterior.mean.shape[1:]
    draws = torch.cat([normal(batch.seeds, stream, shape) for stream in (CHOSEN_POSTERIOR, REJECTED_POSTERIOR)])
    return (posterior.mean + posterior.std * draws).detach() * adapter.vae.config.scaling_factor


def test_turbo_trains_at_four_timesteps_on_a_schedule_that_ends_in_noise(adapter: Adapter, batch: PairBatch) -> None:
    """The official code: 250 k + 249 for k = 0 to 3, and zero terminal SNR, which diffusers computes from betas."""
    scheduler = DDPMScheduler.from_config(adapter.pipeline.scheduler.config, rescale_betas_zero_snr=True)
    few = noisy(adapter, batch, timesteps="turbo")
    drawn = [int(torch.randint(4, (1,), generator=each)) for each in generators(batch.seeds, TIMESTEP)]
    assert few.t.tolist() == [250 * k + 249 for k in drawn] * 2
    eps = normal(batch.seeds, NOISE, few.x_t.shape[1:]).repeat(2, 1, 1, 1)
    torch.testing.assert_close(few.x_t, scheduler.add_noise(latents(adapter, batch), eps, few.t), atol=1e-4, rtol=1e-4)
    assert torch.equal(few.target, eps)
    last = adapter.path.with_zero_terminal_snr()
    assert last.alpha_bar[-1] == 0
    torch.testing.assert_close(last.alpha_bar, scheduler.alphas_cumprod, atol=1e-5, rtol=1e-4)
    assert torch.equal(last.with_zero_terminal_snr().alpha_bar, last.alpha_bar)


def test_zero_snr_changes_the_schedule_and_keeps_all_timesteps(adapter: Adapter, batch: PairBatch) -> None:
    plain, changed = noisy(adapter, batch), noisy(adapter, batch, timesteps="zero-snr")
    assert torch.equal(plain.t, changed.t)
    scheduler = DDPMScheduler.from_config(adapter.pipeline.scheduler.config, rescale_betas_zero_snr=True)
    expected = scheduler.add_noise(latents(adapter, batch), changed.target, changed.t)
    torch.testing.assert_close(changed.x_t, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain.x_t, changed.x_t)


def test_only_the_given_timesteps_are_drawn(adapter: Adapter, batch: PairBatch) -> None:
    found = noisy(adapter, batch, timesteps=(7, 500)).t
    assert set(found.tolist()) == {7, 500}


def test_noise_offset_and_input_perturbation_are_those_of_the_formulas(adapter: Adapter, batch: PairBatch) -> None:
    found = noisy(adapter, batch, noise_offset=0.1, input_perturbation=0.2)
    shape = found.x_t.shape[1:]
    z = normal(batch.seeds, NOISE, shape)
    noise = z + 0.1 * normal(batch.seeds, OFFSET, (shape[0], 1, 1))
    new_noise = noise + 0.2 * normal(batch.seeds, PERTURBATION, shape)
    scheduler = DDPMScheduler.from_config(adapter.pipeline.scheduler.config)
    expected = scheduler.add_noise(latents(adapter, batch), new_noise.repeat(2, 1, 1, 1), found.t)
    torch.testing.assert_close(found.x_t, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.target, noise.repeat(2, 1, 1, 1))
    channels = (noise - z).flatten(2)
    torch.testing.assert_close(channels, channels[..., :1].expand_as(channels), atol=1e-6, rtol=0)
    assert (channels[:, 0, 0] - channels[:, 1, 0]).abs().min() > 1e-4


def test_the_model_s_own_sampler_keeps_its_schedule(adapter: Adapter, batch: PairBatch) -> None:
    before = adapter.path.alpha_bar.clone()
    noisy(adapter, batch, timesteps="turbo")
    assert torch.equal(adapter.path.alpha_bar, before)


def test_inpo_takes_a_set_of_timesteps(adapter: Adapter, batch: PairBatch) -> None:
    config = InPOConfig(timesteps=(249, 749), inversion_steps=2)
    method = PairMethod(config, adapter, None, InvertedNoising(adapter, config))  # type: ignore[arg-type]
    assert set(method.noisy(batch, batch.seeds).t.tolist()) == {249, 749}


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (DPOConfig, {"timesteps": [1000]}, r"timesteps has 1000: expected min_timestep = 0 to max_timestep - 1 = 999"),
        (DPOConfig, {"timesteps": "turbo", "min_timestep": 500}, "timesteps has 249: expected min_timestep = 500"),
        (DPOConfig, {"timesteps": [3, 3]}, "expected some, each of them once"),
        (DPOConfig, {"timesteps": []}, "expected some, each of them once"),
        (DPOConfig, {"timesteps": "tubro"}, "timesteps = 'tubro' is wrong"),
        (InPOConfig, {"noise_offset": 0.1}, "noise_offset = 0.1: inpo finds its noise by inversion"),
        (InPOConfig, {"input_perturbation": 0.1}, "input_perturbation = 0.1: inpo finds its noise"),
        (InPOConfig, {"timesteps": "turbo"}, "timesteps turbo changes the schedule, along which inpo inverts"),
        (
            DPOConfig,
            {"loss_type": ["ipo", "sft"], "loss_weights": [1.0]},
            "loss_weights has 1 numbers for the 2 losses",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_error(cls: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(cls, values, "recipe")


def test_a_timestep_beyond_the_model_s_schedule_is_named(adapter: Adapter) -> None:
    config = DPOConfig(timesteps=(5000,), max_timestep=9000)
    with pytest.raises(ValueError, match="timesteps has 5000: the schedule of scenes-sdxl ends at 999"):
        drawn_noise(config, adapter)


def test_aot_needs_several_pairs_in_a_batch(adapter: Adapter) -> None:
    config = DPOConfig(loss_type="aot", per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="aot compares the pairs of a batch, and per_device_train_batch_size = 1"):
        PairMethod(config, adapter, None, drawn_noise(config, adapter))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_adds_up_the_losses_of_a_list(adapter: Adapter, batch: PairBatch) -> None:
    def loss(**settings: Any) -> tuple[float, dict[str, Tensor]]:
        config = DPOConfig(beta=500.0, **settings)
        value, metrics = PairMethod(config, adapter, None, drawn_noise(config, adapter)).loss(batch)  # type: ignore[arg-type]
        return value.item(), metrics

    (ipo, plain), (sft, _) = loss(loss_type="ipo"), loss(loss_type="sft")
    both, metrics = loss(loss_type=("ipo", "sft"), loss_weights=(0.5, 2.0))
    assert both == pytest.approx(0.5 * ipo + 2 * sft, rel=1e-6)
    assert both == pytest.approx(0.5 * ipo + 2 * plain["error_chosen"].item(), rel=1e-6)
    assert metrics["loss/sft"].item() == pytest.approx(sft, rel=1e-6)
