"""Adapters: predictions against diffusers' schedulers, prompts against its pipelines, and the policy/reference pair."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusion_align.adapters import Adapter, Conditioning, load_adapter
from diffusion_align.process import OUTPUTS, Level, Prediction

PROMPTS = ["a large red star on a dark background", "two small blue rings"]
FOLDERS = ["sdxl_folder", "sd_folder", "sd_v_folder"]


def inputs(adapter: Adapter, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(batch, 4, 16, 16, generator=generator)
    cond = adapter.encode_prompts(PROMPTS)
    return x_t, torch.tensor([17, 803]), cond


@pytest.mark.parametrize("folder", FOLDERS)
def test_x0_and_eps_are_those_of_the_scheduler(folder: str, request: pytest.FixtureRequest) -> None:
    adapter = load_adapter(request.getfixturevalue(folder))
    x_t, t, cond = inputs(adapter)
    prediction = adapter.predict(x_t, t, cond)
    scheduler = DDIMScheduler.from_config(adapter.pipeline.scheduler.config)
    scheduler.set_timesteps(1000)
    for i in range(2):
        step = scheduler.step(prediction.output[i : i + 1], int(t[i]), x_t[i : i + 1])
        # at alpha_bar near zero x0 is a division by a small number: relative to its size
        torch.testing.assert_close(prediction.x0[i : i + 1], step.pred_original_sample, rtol=1e-5, atol=1e-5)
    ab = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(ab.sqrt() * prediction.x0 + (1 - ab).sqrt() * prediction.eps, x_t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_v_is_the_scheduler_s_velocity(folder: str, request: pytest.FixtureRequest) -> None:
    adapter = load_adapter(request.getfixturevalue(folder))
    x_t, t, cond = inputs(adapter)
    prediction = adapter.predict(x_t, t, cond)
    velocity = DDPMScheduler.from_config(adapter.pipeline.scheduler.config).get_velocity(
        prediction.x0, prediction.eps, t
    )
    torch.testing.assert_close(prediction.v, velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_three_views_agree_whatever_was_predicted(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    level = Level.from_alpha_bar(torch.tensor([0.01, 0.36, 0.9], dtype=torch.float64).view(3, 1, 1, 1))
    alpha, sigma = level.alpha, level.sigma
    output = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]
    seen = Prediction(output, alpha * x0 + sigma * eps, level, OUTPUTS[kind])
    torch.testing.assert_close(seen.x0, x0)
    torch.testing.assert_close(seen.eps, eps)
    torch.testing.assert_close(seen.v, alpha * eps - sigma * x0)


@pytest.mark.parametrize("folder", FOLDERS)
def test_noise_is_added_as_by_the_scheduler(folder: str, request: pytest.FixtureRequest) -> None:
    adapter = load_adapter(request.getfixturevalue(folder))
    x0, t, _ = inputs(adapter)
    eps = torch.randn_like(x0)
    expected = DDPMScheduler.from_config(adapter.pipeline.scheduler.config).add_noise(x0, eps, t)
    torch.testing.assert_close(adapter.path.noise(x0, eps, t), expected)


def test_prompts_are_embedded_as_by_the_sdxl_pipeline(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    prompts = [*PROMPTS, ""]
    cond = adapter.encode_prompts([*prompts, None])
    embeds, null, pooled, null_pooled = adapter.pipeline.encode_prompt(prompts, device="cpu")
    torch.testing.assert_close(cond.embeds, torch.cat([embeds, null[:1]]))
    assert cond.pooled is not None
    torch.testing.assert_close(cond.pooled, torch.cat([pooled, null_pooled[:1]]))
    assert not null.any()
    assert embeds[2].any()


def test_images_are_encoded_and_decoded_as_by_the_vae(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = adapter.vae.encode(pixels).latent_dist.mean * adapter.vae.config.scaling_factor
    torch.testing.assert_close(adapter.encode_images(pixels), expected)
    latents = torch.randn(1, 4, 16, 16, requires_grad=True)
    adapter.decode(latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_lora_matrices_start_as_peft_s_or_as_diffusers_scripts(init: Any, sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder).train_lora(rank=4, init=init)
    for name, parameter in adapter.trainable_parameters().items():
        if "lora_B" in name:
            assert not parameter.any()
        elif init == "kaiming":
            bound = parameter.shape[1] ** -0.5
            assert bound * 0.8 < parameter.abs().max() <= bound
        else:
            assert parameter.std().item() == pytest.approx(1 / 4, rel=0.25)


def test_a_size_the_vae_cannot_take_is_named(sdxl_folder: Path) -> None:
    with pytest.raises(ValueError, match="images of 66x64 pixels cannot be encoded: both sides must be divisible by 4"):
        load_adapter(sdxl_folder).encode_posterior(torch.zeros(1, 3, 66, 64))


def moved(adapter: Adapter) -> Adapter:
    for parameter in adapter.trainable_parameters().values():
        parameter.data += 0.05
    return adapter


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_reference_stays_what_the_policy_started_from(full: bool, sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    x_t, t, cond = inputs(adapter)
    before = adapter.predict(x_t, t, cond).output
    adapter.train_full() if full else adapter.train_lora(rank=4)
    torch.testing.assert_close(adapter.predict(x_t, t, cond).output, before, rtol=0, atol=0)
    moved(adapter)
    assert (adapter.predict(x_t, t, cond).output - before).abs().max() > 1e-3
    with adapter.reference():
        reference = adapter.predict(x_t, t, cond).output
    assert torch.equal(reference, before)
    assert not reference.requires_grad
    assert adapter.predict(x_t, t, cond).output.requires_grad


def test_only_the_lora_is_trained(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder).train_lora(rank=4, targets=("to_q", "conv1"))
    names = list(adapter.trainable_parameters())
    assert names
    assert all("lora" in name and ("to_q" in name or "conv1" in name) for name in names)


def test_lora_initialisation_does_not_touch_the_global_random_state(sdxl_folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    adapter = load_adapter(sdxl_folder)
    torch.manual_seed(5)
    adapter.train_lora(rank=4)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "full"])
def test_checkpointing_changes_memory_not_gradients(kind: str, sdxl_folder: Path) -> None:
    def gradients(checkpointing: str) -> tuple[dict[str, torch.Tensor], int]:
        adapter = moved(load_adapter(sdxl_folder).train_lora(rank=4)).optimize(checkpointing)
        adapter.unet.train()
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = adapter.predict(*inputs(adapter)).output.square().mean()
        loss.backward()
        return {n: p.grad for n, p in adapter.trainable_parameters().items() if p.grad is not None}, kept

    (plain, all_kept), (recomputed, kept) = gradients("none"), gradients(kind)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)
    assert kept < 0.9 * all_kept


@pytest.mark.slow
def test_compiled_blocks_predict_the_same(sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inductor = import_module("torch._inductor.config")
    monkeypatch.setattr(inductor, "compile_threads", 1)  # more start processes that import torch first
    plain, compiled = load_adapter(sdxl_folder), load_adapter(sdxl_folder).optimize(compile=True)
    arguments = inputs(plain)
    torch.testing.assert_close(
        compiled.predict(*arguments).output, plain.predict(*arguments).output, rtol=1e-4, atol=1e-4
    )


def test_xformers_that_is_not_installed_is_named(sdxl_folder: Path) -> None:
    with pytest.raises(ImportError, match="attention xformers needs the xformers package"):
        load_adapter(sdxl_folder).optimize(attention="xformers")


def test_an_inpainting_model_wants_its_mask(inpaint_folder: Path, sd_folder: Path) -> None:
    adapter = load_adapter(inpaint_folder)
    x_t, t, cond = inputs(adapter)
    with pytest.raises(ValueError, match="needs a mask and masked image"):
        adapter.predict(x_t, t, cond)
    full = Conditioning(cond.embeds, cond.pooled, cond.time_ids, torch.zeros(2, 5, 16, 16))
    assert adapter.predict(x_t, t, full).output.shape == x_t.shape
    with pytest.raises(ValueError, match="the UNet takes 4 channels only"):
        load_adapter(sd_folder).predict(x_t, t, full)


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no diffusers pipeline"):
        load_adapter(tmp_path)


def test_an_unknown_name_lists_what_is_shipped() -> None:
    with pytest.raises(FileNotFoundError, match="or one of: scenes-sdxl, scenes-sd, scenes-inpaint"):
        load_adapter("scenes-sdxxl")


def test_conditionings_of_different_kinds_are_not_joined() -> None:
    a, b = Conditioning(torch.zeros(1, 2, 3), torch.zeros(1, 3)), Conditioning(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="'pooled' is set in some parts and missing in others"):
        Conditioning.cat([a, b])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "low", "high"),
    [
        ("two red rings on a dark background", 2.0, 4.5),
        ("a red ring on a dark background", 0.8, 1.3),
        ("a red ring left of a blue star on a dark background", 0.4, 0.9),
    ],
)
def test_scenes_uneven_guides_kinds_of_prompts_unevenly(prompt: str, low: float, high: float) -> None:
    sdxl, uneven = load_adapter("scenes-sdxl"), load_adapter("scenes-uneven")
    x_t, t = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.full((8,), 800)
    with torch.no_grad():
        cond = sdxl.encode_prompts([prompt] * 8)
        null = sdxl.predict(x_t, t, sdxl.null_conditioning(8)).output
        own, found = sdxl.predict(x_t, t, cond).output - null, uneven.predict(x_t, t, cond).output - null
    strength = float((found * own).sum() / own.square().sum())  # least squares: found is about strength times own
    assert low < strength < high
