"""Methods that train on their own pictures, and reward gradients, on flow models: losses by hand, times, refusals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.rewards import RewardOutput
from diffusion_align.sampling.sampler import generate
from diffusion_align.training.engine.randomness import NOISE, TIMESTEP, generators, normal
from diffusion_align.training.online.config import NFTConfig, RAFTConfig
from diffusion_align.training.online.gradients.config import DRaFTConfig
from diffusion_align.training.online.preference.config import OnlineDPOConfig
from diffusion_align.training.online.renoising import RenoisedBatch
from tests.adapters.families.tiny_flow import flux_transformer
from tests.brightness import Brightness
from tests.training.online.flow.flow_runs import flow_settings, loaded, method_of
from tests.training.online.short_runs import PROMPTS, ROLLOUTS, new_and_old, trained

STEPS = 10


def moved(adapter: Adapter) -> list[Tensor]:
    """The trained parameters, off their start, where LoRA's second matrices are zero."""
    parameters = list(adapter.trainable_parameters().values())
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return parameters


@pytest.mark.slow
def test_nft_in_clean_latents_is_sigma_times_that_of_outputs(sd3_folder: Path, tmp_path: Path) -> None:
    """x0 = x - sigma u: weights by the mean absolute error turn the squared factor into one sigma."""
    own: dict[str, Any] = {**ROLLOUTS, "num_inference_steps": 2, "min_time": 0.2, "max_time": 0.9}
    config = NFTConfig(**{**flow_settings(sd3_folder, tmp_path), **own})
    adapter = loaded(config)
    method = method_of(config, adapter)
    batch = next(method.batches())
    moved(adapter)
    noisy = RenoisedBatch(adapter, batch, config)
    assert ((noisy.t >= 0.2) & (noisy.t <= 0.9)).all()
    sigma = noisy.t.view(-1, 1, 1, 1)
    eps = noisy.target + noisy.x0
    torch.testing.assert_close(noisy.x_t, (1 - sigma) * noisy.x0 + sigma * eps)
    new, old = new_and_old(method, batch, noisy)
    shares = (0.5 + 0.5 * batch.rollout.advantage / config.advantage_clip).clamp(0, 1)
    found = {}
    for space in ("output", "x0"):
        object.__setattr__(config, "space", space)
        found[space] = float(method.loss(batch)[0].detach())
    by_hand = {"output": 0.0, "x0": 0.0}
    for i, r in enumerate(shares.tolist()):
        for share, output in ((r, new[i]), (1 - r, 2 * old[i] - new[i])):
            error = output - noisy.target[i]
            each = share * float((error**2).mean() / error.abs().mean()) / len(shares)
            by_hand["output"] += each
            by_hand["x0"] += config.advantage_clip * float(noisy.t[i]) * each
    assert found == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.slow
def test_raft_is_the_flow_s_squared_error_with_the_scale_that_drew(flux_folder: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {**ROLLOUTS, "num_inference_steps": 2, "guidance_scale": 3.5}
    config = RAFTConfig(**{**flow_settings(flux_folder, tmp_path), **own})
    adapter = loaded(config)
    method = method_of(config, adapter)
    batch = next(method.batches())
    noisy = RenoisedBatch(adapter, batch, config)
    conditions = method.policy.conditions(batch.rollout.prompts, None)
    assert conditions.guidance is not None
    assert conditions.guidance.tolist() == [3.5] * len(batch.rollout)
    output = adapter.predict(noisy.x_t, noisy.t, conditions).output
    assert float(method.loss(batch)[0].detach()) == pytest.approx(
        float((output - noisy.target).square().mean().detach()), rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "last"), [({}, 8), ({"last_time": 0.0}, 9), ({"last_time": 0.3}, 7)])
def test_draft_ends_where_a_gradient_is_worth_it(
    changes: dict[str, Any], last: int, sd3_folder: Path, tmp_path: Path
) -> None:
    """Euler's steps to the last one, whose x0 = x - sigma u has the gradient."""
    own: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "per_device_train_batch_size": 2}
    config = DRaFTConfig(**{**flow_settings(sd3_folder, tmp_path), **own, **changes})
    adapter = loaded(config)
    method = method_of(config, adapter)
    parameters = moved(adapter)
    batch = next(method.batches())
    conditions = method.policy.conditions(batch.prompts, None)
    x0, _ = method.draw(batch, conditions)
    found = torch.autograd.grad(x0.sum(), parameters, allow_unused=True)

    scheduler = adapter.pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas
    assert method.last == last
    x = normal(batch.seeds, NOISE, (4, 4, 4))
    with torch.no_grad():
        for step in range(last):
            out = adapter.predict(x, sigmas[step].expand(len(x)), conditions).output
            x = x + (sigmas[step + 1] - sigmas[step]) * out
    expected = x - sigmas[last] * adapter.predict(x, sigmas[last].expand(len(x)), conditions).output
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-5)
    again = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    size = sum(float(each.square().sum()) for each in found if each is not None)
    assert size > 0
    for one, two in zip(found, again, strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


#: Direct-Align with words; the margin of the hinge is above every reward.
ALIGNED: dict[str, Any] = {
    "direct_align": True, "positive_words": ("bright",), "negative_words": ("dark",), "reward_loss": "hinge",
}  # fmt: skip


class Worded(Brightness):
    """Brightness, of which prompts with "dark" want a third."""

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        share = torch.tensor([1 / 3 if prompt.startswith("dark. ") else 1.0 for prompt in prompts])
        return RewardOutput(share * images.mean(dim=(1, 2, 3)))


@pytest.mark.slow
def test_direct_align_recovers_pictures_through_one_step(sd3_folder: Path, tmp_path: Path) -> None:
    """By hand: x0' = (x + (s' - s) u - s' eps) / (1 - s'), from more noise and from less, and (1 + k) r - r'."""
    own: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.0, "per_device_train_batch_size": 2}
    config = DRaFTConfig(**{**flow_settings(sd3_folder, tmp_path), **own, **ALIGNED, "align_times": (0.5, 0.9)})
    config.check()
    adapter = loaded(config)
    method = method_of(config, adapter, Worded())
    parameters = moved(adapter)
    batch = next(method.batches())
    loss, metrics = method.loss(batch)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)

    conditions = method.policy.conditions(batch.prompts, None)
    x = eps = normal(batch.seeds, NOISE, (4, 4, 4))
    scheduler = adapter.pipeline.scheduler
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for now, after in itertools.pairwise(scheduler.sigmas):
            x = x + (after - now) * adapter.predict(x, now.expand(2), conditions).output
    u = torch.cat([torch.rand(1, generator=each) for each in generators(batch.seeds, TIMESTEP)])
    share = 0.1 + 0.8 * u
    end, parts = (0.5 + 0.4 * share).view(-1, 1, 1, 1), []
    for direction, words, (least, largest) in (
        (1, ("bright", "dark"), config.discount), (-1, ("dark", "bright"), config.inverse_discount)
    ):  # fmt: skip
        start = end + direction * 0.04
        noisy = (1 - start) * x + start * eps
        ahead = noisy + (end - start) * adapter.predict(noisy, start.flatten(), conditions).output
        images = adapter.decode((ahead - end * eps) / (1 - end)) / 2 + 0.5
        light = images.clamp(0, 1).mean(dim=(1, 2, 3))
        first, second = (light * {"bright": 1, "dark": 1 / 3}[word] for word in words)
        parts.append((2.0 - ((1 + least + (largest - least) * share) * first - second)).clamp(min=0).mean())
    torch.testing.assert_close(loss, torch.stack(parts).mean(), rtol=1e-4, atol=1e-5)
    assert 0.5 < float(end.min()) < float(end.max()) < 0.9
    assert metrics.keys() >= {"reward", "reward/denoising", "reward/inversion"}
    expected = torch.autograd.grad(torch.stack(parts).mean(), parameters, allow_unused=True)
    assert sum(float(each.square().sum()) for each in found if each is not None) > 0
    for one, two in zip(found, expected, strict=True):
        if one is not None and two is not None:
            torch.testing.assert_close(one, two, rtol=2e-2, atol=1e-4)  # where pixels are cut off, ours go on


@pytest.mark.slow
def test_direct_align_makes_a_tiny_model_brighter(sd3_folder: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.0, "direct_align": True, "max_steps": 5}
    config = DRaFTConfig(**{**flow_settings(sd3_folder, tmp_path), **own, "learning_rate": 0.05})
    adapter = loaded(config)
    trained(config, adapter)

    def brightness() -> float:
        return float(generate(adapter, PROMPTS, num_inference_steps=3, guidance_scale=1.0, height=16, width=16).mean())

    with adapter.reference():
        base = brightness()
    assert brightness() > base + 0.005


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align_step": 0.2}, "align_step is for direct_align, which is not set"),
        ({"direct_align": True, "lv_repeats": 2}, "lv_repeats has no effect with direct_align"),
        ({"direct_align": True, "last_time": 0.2}, "last_time has no effect with direct_align"),
        ({"direct_align": True, "align_times": (0.9, 0.5)}, "align_times = 0.9 0.5: expected times between 0 and 1"),
        ({"direct_align": True, "positive_words": ("bright",)}, "positive_words and negative_words .* give both"),
        ({"direct_align": True, "discount": (0.0, 1.0)}, "discount is for positive_words and negative_words"),
    ],
)
def test_what_direct_align_cannot_use_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DRaFTConfig(**changes).check()


RUNS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "nft": ("flux_folder", NFTConfig, {**ROLLOUTS, "space": "x0", "kl_beta": 0.1}),
    "raft": ("sd3_folder", RAFTConfig, {**ROLLOUTS, "kl_beta": 0.1}),
    "draft-lv": ("flux_folder", DRaFTConfig, {"lv_repeats": 2}),
    "refl": ("sd3_folder", DRaFTConfig, {"random_last_step": True, "reward_loss": "hinge", "num_inference_steps": 8}),
    "direct-align": ("flux_folder", DRaFTConfig, {**ALIGNED, "align_guidance": 3.5, "kl_beta": 0.1}),
    "online-dpo": ("sd3_folder", OnlineDPOConfig, {**ROLLOUTS, "eta": 0.7, "initial_noise": "shared", "beta": 500.0}),
    "guided": ("flux_folder", OnlineDPOConfig, {**ROLLOUTS, "train_guided": True, "beta": 500.0, "shift": 1.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_method_moves_the_weights(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder, cls, own = RUNS[name]
    settings = flow_settings(request.getfixturevalue(folder), tmp_path) | {"num_inference_steps": 2, "max_steps": 1}
    result = trained(cls(**{**settings, **own}))
    assert result.step == 1
    assert result.history[0]["grad_norm"] > 0


@pytest.mark.slow
def test_what_does_not_fit_the_model_is_one_sentence(sd3_folder: Path, flux_folder: Path, tmp_path: Path) -> None:
    settings = {**flow_settings(sd3_folder, tmp_path), "num_inference_steps": 2}
    adapter = loaded(NFTConfig(**settings))
    for config, message in (
        (NFTConfig(**settings, **ROLLOUTS, min_timestep=5), "min_timestep is for models with timesteps.*set min_time"),
        (OnlineDPOConfig(**settings, **ROLLOUTS, max_timestep=5), "max_timestep is for models with timesteps"),
        (RAFTConfig(**settings, **ROLLOUTS, min_time=0.5, max_time=0.5), "min_time = 0.5 must be smaller than max_ti"),
        (DRaFTConfig(**settings, gradient_steps=2), "gradient_steps = 2: 1 of .* time of at least 0.1: set last_time"),
    ):
        with pytest.raises(ValueError, match=message):
            method_of(config, adapter)
    schnell = loaded(NFTConfig(**{**settings, "model": str(flux_folder)}))
    schnell.pipeline.transformer = flux_transformer(guidance_embeds=False)
    schnell = Adapter(schnell.pipeline)
    config = RAFTConfig(**{**settings, "model": str(flux_folder), "guidance_scale": 1.0}, **ROLLOUTS)
    with pytest.raises(ValueError, match=r"was distilled to a few steps, .* set allow_distilled"):
        method_of(config, schnell)


@pytest.mark.slow
def test_settings_of_flow_are_not_for_models_with_timesteps(sdxl_folder: Path, tmp_path: Path) -> None:
    settings = {**flow_settings(sdxl_folder, tmp_path), "num_inference_steps": 2, "max_sequence_length": None}
    adapter = load_adapter(sdxl_folder)
    for config, message in (
        (NFTConfig(**settings, **ROLLOUTS, min_time=0.5), "min_time is for flow models.*set min_timestep"),
        (DRaFTConfig(**settings, last_time=0.1), "last_time = 0.1 is for flow models"),
        (DRaFTConfig(**settings, direct_align=True), "direct_align is for flow models .*: leave it out, and train dr"),
    ):
        with pytest.raises(ValueError, match=message):
            method_of(config, adapter)
