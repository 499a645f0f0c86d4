"""Search among pictures, particles, reward gradients, and how much of what was learned is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample
from diffusion_align.sampling.steering import best_of_n, fk_steering, reward_gradient
from tests.brightness import Brightness

PROMPTS = ["a large red star on a dark background", "two small blue rings", "a green square left of a white moon"]
SEEDS = [5, 6, 7]


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(sdxl_folder)


@pytest.mark.slow
def test_best_of_n_keeps_the_best_and_counts(adapter: Adapter) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance": 2.0}
    found = best_of_n(adapter, PROMPTS, Brightness(), 4, seeds=SEEDS, **options)
    candidates = sample(adapter, [PROMPTS[1]] * 4, seeds=[6 + 1_000_003 * k for k in range(4)], **options).images
    assert float(found.reward[1]) == pytest.approx(float(candidates.mean(dim=(1, 2, 3)).max()), abs=1e-5)
    assert found.nfe == 24
    assert found.reward_calls == 4


@pytest.mark.slow
def test_particles_are_resampled_towards_the_reward(adapter: Adapter) -> None:
    options: dict[str, Any] = {"num_inference_steps": 8, "guidance": 2.0, "eta": 1.0}
    best = best_of_n(adapter, PROMPTS, Brightness(), 4, seeds=SEEDS, **options)
    steered = fk_steering(adapter, PROMPTS, Brightness(), 4, seeds=SEEDS, strength=2000.0, every=2, **options)
    assert steered.nfe == best.nfe
    assert steered.reward_calls == 4 + 3 * 4
    assert float((steered.reward - best.reward).mean()) > 0
    unmoved = fk_steering(adapter, PROMPTS, Brightness(), 4, seeds=SEEDS, every=99, **options)
    assert torch.equal(unmoved.images, best.images)
    with pytest.raises(ValueError, match="one-step scheduler with fresh noise"):
        fk_steering(adapter, PROMPTS, Brightness(), 2, seeds=SEEDS, eta=0.0)
    with pytest.raises(ValueError, match="options must have no callback"):
        fk_steering(adapter, PROMPTS, Brightness(), 2, seeds=SEEDS, options=SamplingOptions(callback=lambda _: None))


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_reward_gradients_raise_the_reward(scheduler: Any, adapter: Adapter) -> None:
    options: dict[str, Any] = {
        "num_inference_steps": 6,
        "guidance": 2.0,
        "seeds": SEEDS,
        "scheduler": scheduler.from_config(adapter.pipeline.scheduler.config),
    }
    plain = sample(adapter, PROMPTS, **options).images
    uphill = SamplingOptions(callback=reward_gradient(adapter, PROMPTS, Brightness(), strength=0.3, start=1))
    moved = sample(adapter, PROMPTS, options=uphill, **options).images
    assert (moved.mean(dim=(1, 2, 3)) > plain.mean(dim=(1, 2, 3))).all()
    judge = Brightness()
    judge.differentiable = False
    with pytest.raises(ValueError, match="brightness is not"):
        reward_gradient(adapter, PROMPTS, judge)


@pytest.mark.slow
def test_alignment_strength_is_a_dial(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance": 2.0, "seeds": SEEDS}
    base = sample(adapter, PROMPTS, **options)
    with pytest.raises(ValueError, match="needs trained weights"):
        sample(adapter, PROMPTS, options=SamplingOptions(alignment_strength=0.5), **options)
    adapter.train_lora(rank=4)
    for name, parameter in adapter.trainable_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    trained = sample(adapter, PROMPTS, **options)
    at = {
        w: sample(adapter, PROMPTS, options=SamplingOptions(alignment_strength=w), **options)
        for w in (0.0, 0.5, 1.0, 1.5)
    }
    assert torch.equal(at[0.0].images, base.images)
    assert torch.equal(at[1.0].images, trained.images)
    distance = [float((at[w].images - base.images).abs().mean()) for w in (0.0, 0.5, 1.0, 1.5)]
    assert distance == sorted(distance)
    assert distance[1] > 0
    assert (at[1.0].nfe, at[0.5].nfe) == (6, 12)
    by_step = sample(adapter, PROMPTS, options=SamplingOptions(alignment_strength=[0.0, 0.0, 0.0]), **options)
    assert torch.equal(by_step.images, base.images)
    with pytest.raises(ValueError, match="expected one number or 3"):
        sample(adapter, PROMPTS, options=SamplingOptions(alignment_strength=[0.0, 1.0]), **options)


@pytest.mark.slow
def test_a_loaded_lora_has_the_base_as_its_reference(sdxl_folder: Path, tmp_path: Path) -> None:
    trained = load_adapter(sdxl_folder).train_lora(rank=4)
    for name, parameter in trained.trainable_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    trained.save(tmp_path)
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance": 2.0, "seeds": SEEDS}
    base = sample(load_adapter(sdxl_folder), PROMPTS, **options).images
    loaded = load_adapter(sdxl_folder).load_weights(tmp_path)
    assert torch.equal(sample(loaded, PROMPTS, options=SamplingOptions(alignment_strength=0.0), **options).images, base)
    assert not torch.equal(sample(loaded, PROMPTS, **options).images, base)
