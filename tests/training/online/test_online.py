"""Online methods end to end on tiny models: rollouts, self-test and resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.objectives.trust import FeatureStatistics, TrustWeight
from diffusion_align.rewards import RewardOutput, RewardScorer
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.engine.loop import run_loop
from diffusion_align.training.methods import build_job
from diffusion_align.training.online import grpo
from diffusion_align.training.online.config import (
    GRPOConfig,
    InpaintRLConfig,
    NFTConfig,
    OnlineConfig,
)
from diffusion_align.training.online.gradients.config import DRaFTConfig
from diffusion_align.training.online.gradients.draft import DRaFTMethod
from diffusion_align.training.online.grpo import GRPOMethod
from diffusion_align.training.online.renoising import RenoisedBatch
from tests.brightness import Brightness, seen_features
from tests.training.online.short_runs import METHODS, ROLLOUTS, brightness_gained, build, new_and_old, trained, weights


def prepared(config: OnlineConfig, scorer: RewardScorer | None = None) -> tuple[Adapter, Any]:
    """A policy and its method, before any step."""
    adapter = load_adapter(config.model)
    return adapter, build_job(config, build_accelerator(config), adapter, scorer or Brightness()).method


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_resumes_bit_for_bit(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    # A rollout may last two steps: its pictures come from the checkpoint, and the third step draws others.
    steps = 2 if METHODS[name][0] is DRaFTConfig else 3
    short = {"num_inference_steps": 3, "max_steps": steps, "save_steps": 1, "save_total_limit": 3}
    config = build(name, {**settings, **short})
    whole = trained(config)
    assert whole.step == steps
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in whole.history)
    assert {"loss", "reward", "grad_norm"} <= whole.history[0].keys()
    first_step = str(whole.output_dir / "checkpoint-00000001")
    resumed = trained(replace(config, output_dir=str(tmp_path / "parts"), resume_from_checkpoint=first_step))
    assert [line["step"] for line in resumed.history] == list(range(2, steps + 1))
    first, second = weights(whole.output_dir), weights(resumed.output_dir)
    assert any(tensor.abs().sum() > 0 for key, tensor in first.items() if "lora_B" in key or "lora.up" in key)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grpo", {"train_steps": 1, "stochastic_steps": "window", "per_device_train_batch_size": 16, "kl_target": 0.0}),
        ("nft", {"per_device_train_batch_size": 32}),
        ("raft", {"per_device_train_batch_size": 16}),
        ("draft", {"per_device_train_batch_size": 4, "gradient_steps": 1}),
    ],
)
def test_pictures_get_brighter_when_brightness_is_the_reward(
    name: str, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    options = {"learning_rate": 6e-3, "save_steps": 100, "kl_beta": 0.0, "guidance_scale": 1.0, "max_steps": 3}
    options["model"] = "scenes-sdxl"  # a model that has learned to denoise, which the forward-process methods build on
    if name != "draft":
        options |= {"num_generations": 4, "prompts_per_rollout": 4, "rollout_batch_size": 16, "min_timestep": 500}
    assert brightness_gained(build(name, settings, **{**options, **changes})) > 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("raft", "PNDMScheduler"),
        ("nft", "HeunDiscreteScheduler"),
        ("grpo", "PNDMScheduler"),
        ("draft", "PNDMScheduler"),
    ],
)
def test_models_whose_scheduler_calls_the_denoiser_more_often(
    name: str, scheduler: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """PNDM is SD 1.5's own. Rollouts and validation draw with it; grpo and draft take DDIM's steps instead."""
    pipeline = load_adapter(settings["model"]).pipeline
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, skip_prk_steps=True)
    pipeline.save_pretrained(tmp_path / "model")
    changes: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "num_inference_steps": 2,
        "max_steps": 1,
        "eval_steps": 1,
    }
    changes |= {"num_validation_prompts": 1, "validation_inference_steps": 2}
    result = trained(build(name, settings, **changes))
    assert result.step == 1
    assert any("reward" in line for line in result.history)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_on_policy_the_ratio_is_one(dtype: str, precision: str, settings: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"trajectory_dtype": dtype, "mixed_precision": precision, "num_inference_steps": 3}
    config = build("grpo", settings, **changes)
    assert isinstance(config, GRPOConfig)
    _, method = prepared(config)
    assert isinstance(method, GRPOMethod)
    batches = method.batches()  # the self-test runs in the first and raises if sampler and update disagree
    first, second = next(batches), next(batches)
    assert (first.number, first.on_policy, second.number, second.on_policy) == (0, True, 0, False)
    for batch in (first, second):
        loss, metrics = method.loss(batch)
        assert float(metrics["clip_fraction"]) == 0
        expected = (-batch.rollout.advantage).mean() + method.kl_beta * metrics["kl"]
        assert loss.item() == pytest.approx(expected.item(), abs=1e-7)
        log_prob, rows = method.log_prob(batch)[0].detach(), torch.arange(len(batch.column))
        if not batch.on_policy:
            assert torch.equal(log_prob, batch.rollout.trajectory.old_log_prob[rows, batch.column])
    assert first.rollout.trajectory.after.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


@pytest.mark.slow
def test_a_ratio_that_rounding_spoils_is_refused_with_the_remedy(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grpo.RATIO_TOLERANCE, "bf16", 0.0)
    _, method = prepared(build("grpo", settings, mixed_precision="bf16", num_inference_steps=3))
    with pytest.raises(RuntimeError, match=r"disagree by .* bf16: 0e\+00\): bf16 rounds too coarsely .* raise num_inf"):
        next(method.batches())


@pytest.mark.slow
def test_on_policy_the_ratio_is_one_for_an_empty_prompt(settings: dict[str, Any], tmp_path: Path) -> None:
    """Sampler and update must give the network the same text: SDXL's "" is not its null prompt."""
    config = build("grpo", settings, num_inference_steps=2)
    _, method = prepared(config)
    assert isinstance(method, GRPOMethod)
    method.engine.tasks.prompts = ["", "a red circle"]
    next(method.batches())  # the self-test raises if they disagree


@pytest.mark.slow
def test_recorded_steps_are_the_samplers(settings: dict[str, Any]) -> None:
    """Noise that explains a recorded step must be standard normal, and consecutive steps must fit together."""
    config = build("grpo", settings, train_steps=4, prompts_per_rollout=8, per_device_train_batch_size=64)
    assert isinstance(config, GRPOConfig)
    _, method = prepared(config)
    assert isinstance(method, GRPOMethod)
    rollout = method.draw(0)
    assert rollout.steps is not None
    assert rollout.trajectory is not None
    before, after, log_prob = (getattr(rollout.trajectory, name) for name in ("before", "after", "old_log_prob"))
    order = rollout.steps.argsort(dim=1)
    rows = torch.arange(len(rollout))[:, None]
    assert torch.equal(after[rows, order][:, :-1], before[rows, order][:, 1:])
    assert torch.equal(after[rows, order][:, -1], rollout.latents)
    levels = method.sampling.levels.alpha_sq.double()
    ratio = levels[rollout.steps] / levels[rollout.steps + 1]
    std = ((1 - levels[rollout.steps + 1]) / (1 - levels[rollout.steps]) * (1 - ratio)).sqrt()
    # E[log p] of a Gaussian is minus its entropy; 64 steps of 1,024 values leave an error below 0.01.
    expected = -Normal(0.0, std).entropy()
    assert torch.allclose(log_prob.double(), expected, atol=0.12)
    assert float((log_prob.double() - expected).mean().abs()) < 0.02


@pytest.mark.slow
def test_reward_gradient_is_that_of_the_whole_chain(settings: dict[str, Any]) -> None:
    """With K = all steps the gradient equals a straight-line computation with the scheduler and the VAE."""
    config = build("draft", settings, gradient_steps=4, kl_beta=0.0, guidance_scale=1.0)
    assert isinstance(config, DRaFTConfig)
    adapter, method = prepared(config)
    assert isinstance(method, DRaFTMethod)
    batch = next(method.batches())
    parameters = list(adapter.trainable_parameters().values())
    with torch.no_grad():
        for index, parameter in enumerate(parameters):  # LoRA's second matrices start at zero, without gradient to A
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    loss, _ = method.loss(batch)
    found = torch.autograd.grad(loss, parameters)

    from diffusion_align.training.engine.randomness import NOISE, normal

    scheduler = adapter.pipeline.scheduler
    scheduler.set_timesteps(4)
    x = normal(batch.seeds, NOISE, (4, 16, 16))
    cond = adapter.encode_prompts(batch.prompts)
    for t in scheduler.timesteps:
        output = adapter.predict(x, t.expand(len(x)), cond).output
        x = scheduler.step(output, t, x).prev_sample
    final = float(scheduler.final_alpha_cumprod)
    assert final < 1  # the last step leaves a trace of noise, which x0 has not
    pictures = adapter.decode(method.draw(batch, cond)[0]) / 2 + 0.5
    assert float(loss.detach()) == pytest.approx(-float(pictures.detach().clamp(0, 1).mean()), abs=1e-5)
    expected = torch.autograd.grad(-(adapter.decode(x) / 2 + 0.5).mean(), parameters)
    one, two = (torch.cat([part.flatten() for part in gradient]) for gradient in (found, expected))
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("space", ["output", "x0"])
def test_nft_s_errors_are_those_of_the_space_that_is_asked_for(space: Any, settings: dict[str, Any]) -> None:
    """The official code: clean latents of both implicit policies, adaptive weights, times its largest advantage."""
    config = build("nft", settings, space=space, kl_beta=0.0, nft_beta=0.6, num_inference_steps=2)
    assert isinstance(config, NFTConfig)
    adapter, method = prepared(config)
    batch = next(method.batches())
    with torch.no_grad():
        for index, parameter in enumerate(adapter.trainable_parameters().values()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    noisy = RenoisedBatch(adapter, batch, config)
    new, old = new_and_old(method, batch, noisy)
    signal = adapter.pipeline.scheduler.alphas_cumprod[noisy.t].view(-1, 1, 1, 1)
    x0 = batch.rollout.latents
    eps = (noisy.x_t - signal.sqrt() * x0) / (1 - signal).sqrt()
    expected = []
    for i, advantage in enumerate(batch.rollout.advantage.tolist()):
        r, total = min(max(0.5 + 0.5 * advantage / config.advantage_clip, 0.0), 1.0), 0.0
        for share, output in ((r, 0.6 * new + 0.4 * old), (1 - r, 1.6 * old - 0.6 * new)):
            error = output[i] - eps[i]
            if space == "x0":
                clean = (noisy.x_t[i] - (1 - signal[i]).sqrt() * output[i]) / signal[i].sqrt()
                error = clean - x0[i]
            total += share * float((error**2 / error.abs().mean().clamp(min=1e-5)).mean()) / 0.6
        expected.append(total * (config.advantage_clip if space == "x0" else 1))
    loss, _ = method.loss(batch)
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.slow
def test_losses_can_be_summed(settings: dict[str, Any]) -> None:
    both, short = [], {**settings, "num_inference_steps": 2}
    for reduction in ("mean", "sum"):
        _, method = prepared(build("grpo", short, loss_reduction=reduction, kl_beta=0.0, kl_target=0.0))
        batch = next(method.batches())
        both.append(float(method.loss(batch)[0].detach()))
    assert both[1] == pytest.approx(4 * both[0], rel=1e-5)
    assert both[1] == pytest.approx(-float(batch.rollout.advantage.sum()), rel=1e-4)


@pytest.mark.slow
def test_pictures_of_one_each_are_compared_with_the_batch(inpainting: dict[str, Any]) -> None:
    """PrefPaint: every picture is drawn once, and standardised over all that were drawn."""
    changes = {"num_generations": 1, "prompts_per_rollout": 4, "advantage_baseline": "batch", "trust": "none"}
    _, method = prepared(InpaintRLConfig(**{**inpainting, **changes}))
    rollout = method.draw(0)
    reward = rollout.reward.numpy()
    assert rollout.advantage.tolist() == pytest.approx(((reward - reward.mean()) / reward.std()).tolist(), rel=1e-4)
    assert len(set(method.engine.tasks.names(range(4)))) == 4


@pytest.fixture
def inpainting(settings: dict[str, Any], inpaint_folder: Path) -> dict[str, Any]:
    own = {"model": str(inpaint_folder), "dataset": "scenes-holes", "num_inference_steps": 2}
    return {**settings, **METHODS["grpo"][1], **own}


@pytest.mark.slow
def test_inpainting_leaves_the_rest_of_the_picture_alone(inpainting: dict[str, Any]) -> None:
    seen: list[Tensor] = []

    class Watching(Brightness):
        needs = frozenset({"source_images", "masks"})

        def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
            outside = (context["masks"] < 0.5).expand_as(images)
            seen.append((images - context["source_images"])[outside].abs().max())
            seen.append((images - context["source_images"])[~outside].abs().max())
            return super().evaluate(images, prompts, context)

    _, method = prepared(InpaintRLConfig(**inpainting, trust="none"), Watching())
    rollout = method.draw(0)
    assert max(float(value) for value in seen[::2]) == 0
    assert min(float(value) for value in seen[1::2]) > 0
    assert rollout.inpaint.shape == (4, 5, 16, 16)
    # The group shares picture and hole; another prompt has others.
    assert torch.equal(rollout.inpaint[0], rollout.inpaint[1])
    assert not torch.equal(rollout.inpaint[0], rollout.inpaint[2])


@pytest.fixture
def seen(tmp_path: Path) -> FeatureStatistics:
    """What the features of a scorer were in its training; they lie where ``trusting`` says that the scorer is."""
    statistics = seen_features()
    (tmp_path / "scorer").mkdir()
    statistics.save(tmp_path / "scorer" / "trust.safetensors")
    return statistics


@pytest.fixture
def trusting(inpainting: dict[str, Any], seen: FeatureStatistics, tmp_path: Path) -> dict[str, Any]:
    return {**inpainting, "scorers": (str(tmp_path / "scorer"),), "kl_beta": 0.0, "kl_target": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["prefpaint", "mahalanobis"])
def test_trust_weighs_pictures_by_their_reward_features(
    trust: Any, trusting: dict[str, Any], seen: FeatureStatistics
) -> None:
    features: list[Tensor] = []

    class Watching(Brightness):
        def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
            output = super().evaluate(images, prompts, context)
            assert output.features is not None
            features.append(output.features)
            return output

    _, method = prepared(InpaintRLConfig(**trusting, trust=trust), Watching())
    batch = next(method.batches())
    expected = TrustWeight(trust, seen)(torch.cat(features))
    assert expected.unique().numel() == 4
    torch.testing.assert_close(method.stream.rollout.trust, expected)
    weighed, plain = batch.rollout.advantage * batch.rollout.trust, batch.rollout.advantage
    assert float(method.loss(batch)[0].detach()) == pytest.approx(-float(weighed.mean()), abs=1e-6)
    assert float(weighed.mean()) != pytest.approx(float(plain.mean()), abs=1e-4)


@pytest.mark.slow
def test_inpaint_rl_trains_with_trust(trusting: dict[str, Any], tmp_path: Path) -> None:
    short = {**trusting, "max_steps": 2, "masked_log_prob": True}
    trust = trained(InpaintRLConfig(**short, trust="mahalanobis")).history
    plain = trained(InpaintRLConfig(**{**short, "output_dir": str(tmp_path / "plain")}, trust="none")).history
    assert trust[0]["reward"] == plain[0]["reward"]
    assert trust[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-2)
    assert [line["trust"] for line in plain] == [1, 1]
    assert all(0 < line["trust"] < 2 and line["trust"] != 1 for line in trust)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("grpo", {"per_device_train_batch_size": 3}, "8 training items, an optimiser step takes 3"),
        ("grpo", {"train_steps": 5, "prompts_per_rollout": 4}, "train_steps = 5: only 4"),
        ("nft", {"num_generations": 1, "prompts_per_rollout": 4}, "num_generations = 1"),
        (
            "grpo",
            {"num_generations": 1, "prompts_per_rollout": 4, "advantage_baseline": "batch", "advantage_scale": "group"},
            "num_generations = 1: advantage_baseline batch",
        ),
        ("grpo", {"history_size": 4}, "history_min_count = 16: only history_size = 4 are remembered"),
        ("raft", {"keep": 3, "updates_per_picture": 4}, "keep = 3: only 2"),
        ("nft", {"min_timestep": 1000}, "min_timestep = 1000"),
        ("draft", {"gradient_steps": 5}, "gradient_steps = 5: there are 4"),
        ("draft", {"lv_repeats": 2}, "lv_repeats re-noises the last step"),
        ("grpo", {"trust": "prefpaint", "scorers": ("scenes-clip",)}, "give trust_dataset"),
        ("grpo", {"trust": "prefpaint"}, "2 reward features, expected 256"),
        ("grpo", {"dataset": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_settings_that_do_not_fit_are_one_error(
    name: str, changes: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trained(build(name, settings, **changes))


def test_inpaint_rl_wants_an_inpainting_model(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs an inpainting model"):
        trained(InpaintRLConfig(**{**settings, **ROLLOUTS, "train_steps": 2}))


def test_draft_wants_a_differentiable_scorer(settings: dict[str, Any]) -> None:
    scorer = Brightness()
    scorer.differentiable = False
    with pytest.raises(ValueError, match="needs a differentiable scorer, brightness is not"):
        trained(build("draft", settings), scorer=scorer)


@pytest.mark.slow
def test_early_stopping_keeps_the_best_weights(settings: dict[str, Any]) -> None:
    values = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    settings = settings | {"num_inference_steps": 2}
    config = build("nft", settings, eval_steps=1, early_stopping_patience=2, max_steps=10)
    adapter, method = prepared(config)
    result = run_loop(config, adapter, method, method.accelerator, lambda step: {"eval/reward": next(values)})
    assert (result.stopped, result.step) == ("early stopping", 3)
    best, last = weights(Path(config.output_dir) / "best"), weights(config.output_dir)
    assert not all(torch.equal(best[key], last[key]) for key in best)
    one_step = trained(build("nft", settings, max_steps=1, output_dir=str(Path(config.output_dir) / "one")))
    assert all(torch.equal(tensor, best[key]) for key, tensor in weights(one_step.output_dir).items())
