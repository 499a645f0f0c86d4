"""Guiders in a sampler of k-diffusion's kind: the pictures of our own sampler, and which step a noise level is of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning, load_adapter
from diffusion_align.adapters.prompts import conditioning
from diffusion_align.guidance.annealing import AnnealingGuidance, AnnealingSchedule
from diffusion_align.guidance.by_sigma import SigmaRun
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.guider import StepGuidance
from diffusion_align.guidance.schedules import ScheduleGuidance
from diffusion_align.process import set_steps
from diffusion_align.sampling.sampler import sample
from tests.adapters.families.tiny_flow import LENGTH
from tests.guidance.test_guidance import new_evaluator

PROMPTS = ["a large red star on a dark background", "two small blue rings"]
SEEDS = [5, 6]
STEPS = 4


@torch.no_grad()
def euler(adapter: Adapter, scheduler: Any, guidance: StepGuidance) -> Tensor:
    """Euler's steps in noise levels (2206.00364, algorithm 2), as k-diffusion and ComfyUI take them, with our guider.

    Latents are x0 + sigma eps, of flow models (1 - sigma) x0 + sigma eps; the model's predictions are x0.
    """
    levels = adapter.path.levels(scheduler, STEPS)
    sigmas = levels.sigma if adapter.path.straight else levels.sigma / levels.alpha
    size = adapter.default_resolution
    cond, null = (conditioning(adapter, texts, size, size) for texts in (PROMPTS, [None] * len(PROMPTS)))
    run = SigmaRun(sigmas.tolist(), adapter.path.straight, cond, PROMPTS)
    shape = (1, adapter.latent_channels, *[size // adapter.vae_scale_factor] * 2)
    x = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    x = x if adapter.path.straight else x / levels.alpha[0]
    for sigma, after, t in zip(sigmas, sigmas[1:], adapter.path.times(scheduler), strict=False):
        guidance.bind(run.view(x, float(sigma)))
        x_t = x if adapter.path.straight else x / (1 + sigma**2) ** 0.5
        both = [cond, null][: guidance.num_conditions]
        denoised = guidance.forward(*(adapter.predict(x_t, t.expand(len(x)), part).x0 for part in both)).pred
        x = x + (after - sigma) * (x - denoised) / sigma
    return x * levels.alpha[-1] if not adapter.path.straight else x


def drawn_both_ways(adapter: Adapter, guidance: StepGuidance, scheduler: Any) -> tuple[Tensor, Tensor]:
    """Latents and scales by Euler's steps with the guider, less those of our sampler with ``scheduler``."""
    ours = sample(adapter, PROMPTS, num_inference_steps=STEPS, guidance=guidance, seeds=SEEDS, scheduler=scheduler)
    asked = copy.deepcopy(scheduler)
    set_steps(asked, STEPS)
    latents = euler(adapter, asked, guidance)
    return latents - ours.latents, torch.stack(guidance.scales) - ours.scales


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(sdxl_folder)


def annealing() -> AnnealingGuidance:
    weights = (torch.tensor([[0.3, -1.0]]), torch.tensor([0.1]), torch.tensor([2.0]), torch.tensor(0.2))
    return AnnealingGuidance().use(AnnealingSchedule(1.5, 7.0, torch.tensor([0.0, -2.0]), torch.ones(2), *weights))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cosine", "interval", "annealing", "dynamic"])
def test_eulers_steps_with_a_guider_are_our_samplers_ddim_steps(kind: str, adapter: Adapter) -> None:
    guidance: StepGuidance = {
        "cosine": lambda: ScheduleGuidance(5.0, "cosine"),
        "interval": lambda: ScheduleGuidance(5.0, sigma_high=10.0, stop=0.75),
        "annealing": annealing,
        "dynamic": lambda: DynamicGuidance(candidates=[1.5, 4.0, 8.0]),
    }[kind]()
    if isinstance(guidance, DynamicGuidance):
        guidance.use(new_evaluator(adapter), [])
    scheduler = DDIMScheduler.from_config(adapter.pipeline.scheduler.config, timestep_spacing="trailing")
    latents, scales = drawn_both_ways(adapter, guidance, scheduler)
    assert guidance.branches == ([1, 2, 2, 1] if kind == "interval" else [2, 2, 2, 2])
    assert latents.abs().max() < 1e-4
    assert scales.abs().max() < 1e-4


@pytest.mark.slow
def test_the_same_on_the_straight_path_of_flow_models(sd3_folder: Path) -> None:
    adapter = load_adapter(sd3_folder, max_sequence_length=LENGTH)
    latents, scales = drawn_both_ways(adapter, ScheduleGuidance(4.0, "linear"), adapter.pipeline.scheduler)
    assert latents.abs().max() < 1e-4
    assert scales.abs().max() < 1e-6


def run_of(*sigmas: float) -> SigmaRun:
    return SigmaRun(sigmas, False, Conditioning(torch.zeros(1, 2, 3)), [""])


def test_calls_between_two_noise_levels_belong_to_one_step() -> None:
    run, x = run_of(10.0, 5.0, 1.0, 0.0), torch.ones(1, 4, 2, 2)
    calls = [10.0, 7.0, 5.0003, 2.0, 1.0, 0.5]
    views = [run.view(x, sigma) for sigma in calls]
    assert [view.step for view in views] == [0, 0, 1, 1, 2, 2]
    assert [view.again for view in views] == [False, True] * 3
    assert [view.num_steps for view in views] == [3] * 6
    assert [view.after.sigma / view.after.alpha for view in views] == pytest.approx([5, 5, 1, 1, 0, 0])
    for view, sigma in zip(views, calls, strict=True):
        assert view.now.sigma / view.now.alpha == pytest.approx(sigma)
        torch.testing.assert_close(view.x_t, x / (1 + sigma**2) ** 0.5)


@pytest.mark.parametrize("sigmas", [(1.0,), (0.0, 1.0, 5.0)])
def test_noise_levels_must_fall(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="at least two noise levels that fall from step to step, found"):
        run_of(*sigmas)
