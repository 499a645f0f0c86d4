"""Fused rollouts: the update on the sampler's own graph is the update that a second forward pass would give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.sampling.control import Moment, SamplingOptions
from diffusion_align.sampling.sampler import sample
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.methods import build_job
from diffusion_align.training.online.config import GRPOConfig, InpaintRLConfig
from diffusion_align.training.online.fused_grpo import FusedGRPOMethod
from diffusion_align.training.online.grpo import GRPOMethod
from diffusion_align.training.run import train
from tests.brightness import Brightness, seen_features


@pytest.fixture
def settings(sdxl_folder: Path, tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue squares\na green star\na yellow triangle")
    return {
        "model": str(sdxl_folder), "dataset": str(prompts), "output_dir": str(tmp_path / "run"),
        "num_inference_steps": 3, "guidance_scale": 2.0, "num_generations": 2, "prompts_per_rollout": 2,
        "rollout_batch_size": 2, "train_steps": 2, "per_device_train_batch_size": 8, "max_steps": 3, "save_steps": 2,
        "learning_rate": 2e-3, "lora_rank": 4, "logging_steps": 1, "report_to": "none", "progress": False,
    }  # fmt: skip


def first_update(config: GRPOConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Gradients, metrics and denoiser calls per picture of the first update, of a LoRA that does something already."""
    adapter = load_adapter(config.model)
    method = build_job(config, build_accelerator(config), adapter, Brightness()).method
    parameters = adapter.trainable_parameters()
    with torch.no_grad():
        for index, parameter in enumerate(parameters.values()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    assert isinstance(method, FusedGRPOMethod if config.fused_rollouts else GRPOMethod)
    loss, metrics = method.loss(next(method.batches()))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    assert gradients.keys() == parameters.keys()
    return gradients, metrics, method.engine.nfe


def assert_same_update(config: GRPOConfig) -> None:
    expected, metrics, _ = first_update(config)
    found, fused_metrics, _ = first_update(replace(config, fused_rollouts=True))
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * scale), name
    assert fused_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert float(fused_metrics[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"train_steps": 3, "per_device_train_batch_size": 12},
        {"kl_beta": 0.5, "rollout_batch_size": 3},  # random steps, batches that cut through a prompt's pictures
        {"stochastic_steps": "window", "kl_beta": 0.5},
        {"guidance_scale": 1.0, "shared_noise": False},
        {"trajectory_dtype": "bf16", "gradient_checkpointing": "full"},
    ],
)
def test_fused_gradients_are_those_of_a_second_forward(changes: dict[str, Any], settings: dict[str, Any]) -> None:
    assert_same_update(GRPOConfig(**{**settings, **changes}))


@pytest.mark.slow
def test_fused_gradients_of_the_hole_with_trust_are_those_of_a_second_forward(
    settings: dict[str, Any], inpaint_folder: Path, tmp_path: Path
) -> None:
    seen_features().save(tmp_path / "trust.safetensors")
    own = {"model": str(inpaint_folder), "dataset": "scenes-holes", "scorers": (str(tmp_path),), "kl_beta": 0.5}
    assert_same_update(InpaintRLConfig(**{**settings, **own}))


@pytest.mark.slow
def test_a_fused_run_resumes_bit_for_bit_and_follows_the_unfused_one(settings: dict[str, Any], tmp_path: Path) -> None:
    config = GRPOConfig(**{**settings, "max_steps": 2}, fused_rollouts=True, kl_beta=0.1, kl_target=0.01)

    def weights(part: GRPOConfig) -> dict[str, Tensor]:
        return load_file(train(part, scorer=Brightness()).output_dir / "pytorch_lora_weights.safetensors")

    whole = weights(config)
    train(replace(config, output_dir=str(tmp_path / "parts"), max_steps=1), scorer=Brightness())
    parts = weights(replace(config, output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest"))
    unfused = weights(replace(config, output_dir=str(tmp_path / "unfused"), fused_rollouts=False))
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor)
        assert torch.allclose(unfused[name], tensor, atol=5e-4), name


@pytest.mark.slow
def test_accumulated_fused_rollouts_are_the_mean_of_their_updates(settings: dict[str, Any]) -> None:
    config = GRPOConfig(**settings, fused_rollouts=True)
    adapter = load_adapter(config.model)
    method = build_job(config, build_accelerator(config), adapter, Brightness()).method
    parameters = list(adapter.trainable_parameters().values())
    batches, norms = method.batches(), []
    for _ in range(2):
        norms.append(torch.autograd.grad(method.loss(next(batches))[0], parameters))
    mean = torch.cat([((a + b) / 2).flatten() for a, b in zip(*norms, strict=True)]).norm()
    history = train(replace(config, gradient_accumulation_steps=2, max_steps=1), scorer=Brightness()).history
    assert history[0]["grad_norm"] == pytest.approx(float(mean), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_iterations": 2}, "num_iterations = 2 needs fused_rollouts false"),
        ({"per_device_train_batch_size": 4}, "must be its 8 training items, not 4"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
    ],
)
def test_what_needs_the_rollout_again_cannot_be_fused(
    changes: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        train(GRPOConfig(**{**settings, **changes}, fused_rollouts=True), scorer=Brightness())


def test_a_sharded_policy_cannot_be_fused(settings: dict[str, Any]) -> None:
    sharded: Any = SimpleNamespace(distributed_type=DistributedType.FSDP)
    nothing: Any = None
    with pytest.raises(ValueError, match="FSDP cannot: set fused_rollouts to false"):
        FusedGRPOMethod(GRPOConfig(**settings, fused_rollouts=True), nothing, nothing, sharded)


@pytest.mark.slow
def test_what_pictures_of_a_prompt_share_is_predicted_once(settings: dict[str, Any]) -> None:
    """From shared noise, two pictures of a prompt are the same until the first fresh noise."""
    settings |= {"train_steps": 3, "per_device_train_batch_size": 12}
    assert first_update(GRPOConfig(**settings))[2] == 2 * (0.5 + 2)
    assert first_update(GRPOConfig(**settings, shared_noise=False))[2] == 2 * 3


@pytest.fixture
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(str(sdxl_folder)).train_lora(rank=2)


@pytest.fixture
def draw(adapter: Adapter) -> Callable[..., list[Moment]]:
    def run(**options: Any) -> list[Moment]:
        moments: list[Moment] = []
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
        prompts = ["a red circle"] * 2 + ["a green star"] * 2
        every = SamplingOptions(latents=noise, callback=moments.append, **options)
        sample(adapter, prompts, num_inference_steps=2, seeds=range(4), options=every)
        return moments

    return run


@pytest.mark.slow
def test_the_sampler_keeps_graphs_where_asked_and_changes_nothing(draw: Callable[..., list[Moment]]) -> None:
    graph = torch.tensor([[True, False, False, True], [False] * 4])
    plain, traced, shared = draw(), draw(graph=graph), draw(graph=graph, copies=[2, 1])
    assert [moment.x0.requires_grad for moment in plain] == [False, False]
    for moments in (traced, shared):
        assert [moment.x0.requires_grad for moment in moments] == [True, False]
        assert not any(moment.latents.requires_grad for moment in moments)
        for moment, expected in zip(moments, plain, strict=True):
            assert torch.allclose(moment.latents, expected.latents, atol=1e-4)


def test_weights_that_autocast_has_cast_without_a_graph_are_cast_again(
    draw: Callable[..., list[Moment]], adapter: Adapter
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        last = draw(graph=torch.tensor([[False] * 4, [True] * 4]), copies=[2, 2])[-1]
    last.x0.square().sum().backward()
    for name, parameter in adapter.trainable_parameters().items():
        assert parameter.grad is not None, name
        assert "lora_A" in name or float(parameter.grad.abs().max()) > 0, name


def test_copies_must_not_be_cut(draw: Callable[..., list[Moment]]) -> None:
    with pytest.raises(ValueError, match="batches of 3 of 4 images cut through runs of 2"):
        draw(copies=2, batch_size=3)
