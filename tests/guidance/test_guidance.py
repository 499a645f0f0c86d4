"""Guiders: schedules against closed forms, the search against explicit scheduler steps, diffusers' own guiders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
)
from diffusers.hooks import LayerSkipConfig

from diffusion_align.adapters import Adapter, Conditioning, load_adapter
from diffusion_align.guidance.dynamic import WEIGHTINGS, DynamicGuidance, adaptive, adaptive_signed, linear
from diffusion_align.guidance.guider import StepView
from diffusion_align.guidance.judges.evaluator import EvaluatorSettings, LatentEvaluator, level_bin
from diffusion_align.guidance.modular import modular_pipeline
from diffusion_align.guidance.schedules import ScheduleGuidance, TableGuidance, as_guider
from diffusion_align.process import OUTPUTS, Level, VariancePreserving, log_snr
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import generate, sample
from tests.brightness import Brightness

PROMPTS = ["a large red star on a dark background", "two small blue rings", "a green square left of a white moon"]
SEEDS = [5, 6, 7]
SCHEDULERS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(sdxl_folder)


def new_evaluator(adapter: Adapter, **options: Any) -> LatentEvaluator:
    null = adapter.null_conditioning(1)
    assert null.pooled is not None
    torch.manual_seed(3)
    settings = EvaluatorSettings(
        adapter.latent_channels,
        adapter.unet.config.sample_size,
        null.embeds.shape[-1],
        null.pooled.shape[-1],
        **options,
    )
    return LatentEvaluator(settings).eval()


def dynamic(adapter: Adapter, **options: Any) -> DynamicGuidance:
    guider = DynamicGuidance(**options)
    guider.use(new_evaluator(adapter), [])
    return guider


def view(step: int = 0, num_steps: int = 4, alpha_bar: float = 0.3, batch: int = 2, kind: Any = "epsilon") -> StepView:
    x_t = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(step))
    return StepView(
        step, num_steps, x_t, Level.from_alpha_bar(alpha_bar), Level.from_alpha_bar(0.5),
        Conditioning(torch.zeros(batch, 2, 3)), range(batch), OUTPUTS[kind], lambda latents: latents, ["a"] * batch,
    )  # fmt: skip


# -- schedules and tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "power"), [("constant", 1), ("linear", 1), ("cosine", 1), ("power", 3)])
def test_schedules_have_the_mean_they_are_given(schedule: str, power: float) -> None:
    guider = ScheduleGuidance(6.0, schedule, power)
    values = []
    for step in range(200):
        guider.bind(view(step, 200))
        values.append(guider.value())
    assert np.mean(values) == pytest.approx(6.0, rel=1e-3)
    assert schedule == "constant" or values == sorted(values)


def test_the_interval_is_in_sigma_and_saves_the_null_prediction() -> None:
    guider = ScheduleGuidance(4.0, sigma_low=0.5, sigma_high=2.0)
    for sigma, on in ((0.4, False), (0.6, True), (2.0, True), (2.1, False)):
        guider.bind(view(alpha_bar=1 / (1 + sigma**2)))
        assert guider.wants_null() is on
        assert guider.value() == (4.0 if on else 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduleGuidance(3.0, "sine"), "guidance schedule 'sine': expected one of constant"),
        (lambda: TableGuidance(["a"]), "guidance table: expected numbers"),
        (lambda: TableGuidance([[1.0, 2.0], [3.0]]), "guidance table: expected numbers"),
        (lambda: TableGuidance([]), "guidance table: expected numbers"),
        (lambda: as_guider(None), "guidance = None"),
        (lambda: DynamicGuidance(weighting="best"), "weighting 'best'"),
        (lambda: DynamicGuidance(candidates=[]), "at least one guidance scale"),
        (lambda: DynamicGuidance(None), "needs an evaluator"),
        (lambda: DynamicGuidance(normalise="none"), "normalise 'none'"),
    ],
)
def test_wrong_guidance_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_tables_must_fit_the_run(adapter: Adapter) -> None:
    with pytest.raises(ValueError, match="it has 3 steps, the run 2"):
        sample(adapter, PROMPTS, num_inference_steps=2, guidance=TableGuidance([1.0, 2.0, 3.0]), seeds=SEEDS)
    with pytest.raises(ValueError, match="scales for 2 images"):
        sample(adapter, PROMPTS, num_inference_steps=2, guidance=[2.0, 3.0], seeds=SEEDS)


# -- the sampler and its guiders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_levels_are_those_of_the_schedule(scheduler: Any, adapter: Adapter) -> None:
    made = scheduler.from_config(adapter.pipeline.scheduler.config)
    made.set_timesteps(5)
    levels = VariancePreserving.from_scheduler(made).levels(made).alpha_sq
    assert len(levels) == 6
    assert (levels.diff() > 0).all()
    expected = made.alphas_cumprod[made.timesteps.long()]
    torch.testing.assert_close(levels[:-1], expected.float(), rtol=0.03, atol=1e-3)


@pytest.mark.slow
def test_one_scale_per_image_is_every_image_alone(adapter: Adapter) -> None:
    scales = [1.0, 3.0, 6.0]
    two = SamplingOptions(batch_size=2)
    together = sample(adapter, PROMPTS, num_inference_steps=4, guidance=scales, seeds=SEEDS, options=two).images
    for i, scale in enumerate(scales):
        alone = generate(adapter, [PROMPTS[i]], num_inference_steps=4, guidance_scale=scale, seeds=[SEEDS[i]])
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_diffusers_classifier_free_guidance_comes_through_the_same_door(scheduler: Any, adapter: Adapter) -> None:
    options: dict[str, Any] = {
        "num_inference_steps": 4,
        "seeds": SEEDS,
        "scheduler": scheduler.from_config(adapter.pipeline.scheduler.config),
    }
    ours = sample(adapter, PROMPTS, guidance=3.0, **options)
    theirs = sample(adapter, PROMPTS, guidance=ClassifierFreeGuidance(guidance_scale=3.0), **options)
    torch.testing.assert_close(ours.images, theirs.images, rtol=0, atol=1e-5)
    assert ours.nfe == theirs.nfe == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guider", "nfe"),
    [
        (AdaptiveProjectedGuidance(guidance_scale=3.0), 8),
        (ClassifierFreeZeroStarGuidance(guidance_scale=3.0), 8),
        (
            PerturbedAttentionGuidance(
                guidance_scale=3.0,
                perturbed_guidance_scale=2.0,
                perturbed_guidance_start=0.0,
                perturbed_guidance_stop=1.0,
                perturbed_guidance_config=LayerSkipConfig(
                    indices=[0],
                    fqn="mid_block.attentions.0.transformer_blocks",
                    skip_attention=False,
                    skip_ff=False,
                    skip_attention_scores=True,
                ),
            ),
            11,  # diffusers does not perturb the first step
        ),
        (ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5), 6),
    ],
    ids=["apg", "zero-star", "pag", "stopped"],
)
def test_other_guiders_of_diffusers_run_and_forget_their_last_run(guider: Any, nfe: int, adapter: Adapter) -> None:
    first = sample(adapter, PROMPTS, num_inference_steps=4, guidance=guider, seeds=SEEDS)
    again = sample(adapter, PROMPTS, num_inference_steps=4, guidance=guider, seeds=SEEDS)
    assert torch.equal(first.images, again.images)
    assert first.nfe == nfe
    plain = generate(adapter, PROMPTS, num_inference_steps=4, guidance_scale=1.0, seeds=SEEDS)
    assert (first.images - plain).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_the_modular_pipeline_draws_the_samplers_images(scheduler: Any, adapter: Adapter) -> None:
    guider = DynamicGuidance(None, candidates=(1.0, 2.0, 4.0), pixel_scorers=("brightness",))
    guider.use(scorers=[Brightness()])
    kept = adapter.pipeline.scheduler
    made = scheduler.from_config(kept.config)
    ours = sample(adapter, PROMPTS, num_inference_steps=4, guidance=guider, seeds=SEEDS, scheduler=made)
    pipeline = modular_pipeline(adapter, guider)
    pipeline.update_components(scheduler=scheduler.from_config(kept.config))
    theirs = pipeline(
        prompt=PROMPTS, num_inference_steps=4, height=64, width=64, output="images", output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    )  # fmt: skip
    assert (ours.images - torch.as_tensor(theirs)).abs().max() < 1e-4
    assert len(ours.scales.unique()) > 1


def test_the_modular_pipeline_tells_judges_its_prompts(adapter: Adapter) -> None:
    guider, seen = dynamic(adapter, evaluator="none", candidates=(1.0, 2.0)), []
    bind = guider.bind
    guider.bind = lambda view: (seen.append(view.prompts), bind(view))[1]  # type: ignore[method-assign, func-returns-value]
    pipeline = modular_pipeline(adapter, guider)
    options: dict[str, Any] = {"num_inference_steps": 1, "height": 64, "width": 64, "output": "images"}
    pipeline(prompt=PROMPTS[0], **options)
    pipeline(prompt=PROMPTS[:2], num_images_per_prompt=2, **options)
    assert seen == [[PROMPTS[0]], [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]]


def test_the_modular_pipeline_is_sdxls(sd_folder: Path) -> None:
    with pytest.raises(ValueError, match="expected an SDXL"):
        modular_pipeline(load_adapter(sd_folder), ScheduleGuidance(3.0))


@pytest.mark.slow
def test_a_trajectory_leads_from_noise_to_the_image(adapter: Adapter) -> None:
    kept = SamplingOptions(batch_size=2, keep_trajectory=True)
    samples = sample(adapter, PROMPTS, num_inference_steps=3, seeds=SEEDS, options=kept)
    assert samples.trajectory is not None
    assert samples.trajectory.shape == (4, 3, 4, 16, 16)
    images = (adapter.decode(samples.trajectory[-1]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, samples.images, rtol=0, atol=1e-4)


# -- dynamic guidance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_candidates_are_those_of_explicit_scheduler_steps(kind: Any, adapter: Adapter) -> None:
    scheduler = DDIMScheduler.from_config(adapter.pipeline.scheduler.config, prediction_type=kind)
    scheduler.set_timesteps(6)
    levels = VariancePreserving.from_scheduler(scheduler).levels(scheduler).alpha_sq.tolist()
    generator = torch.Generator().manual_seed(1)
    x_t, cond, null = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    for step, t in enumerate(scheduler.timesteps):
        seen = StepView(
            step, 6, x_t, *map(Level.from_alpha_bar, levels[step : step + 2]), Conditioning(x_t), range(2),
            OUTPUTS[kind], lambda latents: latents, ["", ""],
        )  # fmt: skip
        low, high = seen.ahead(null), seen.ahead(cond)
        for scale in (1.0, 3.0, 7.5, 15.0):
            output = null + scale * (cond - null)
            explicit = scheduler.step(output, t, x_t)
            torch.testing.assert_close(low + scale * (high - low), explicit.prev_sample, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(seen.clean(output), explicit.pred_original_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_with_one_candidate_it_is_static_guidance_and_schedulers_stay_intact(scheduler: Any, adapter: Adapter) -> None:
    options: dict[str, Any] = {
        "num_inference_steps": 5,
        "seeds": SEEDS,
        "scheduler": scheduler.from_config(adapter.pipeline.scheduler.config),
    }
    searched = sample(adapter, PROMPTS, guidance=dynamic(adapter, evaluator="none", candidates=[3.0]), **options)
    static = sample(adapter, PROMPTS, guidance=3.0, **options)
    assert torch.equal(searched.images, static.images)
    assert searched.nfe == static.nfe


@pytest.mark.slow
def test_it_takes_the_scale_that_the_scorer_likes_best_and_tells(adapter: Adapter) -> None:
    guider = DynamicGuidance(None, candidates=(1.0, 2.0, 4.0), pixel_scorers=("brightness",), normalise="population")
    guider.use(scorers=[Brightness()])
    samples = sample(adapter, PROMPTS, num_inference_steps=3, guidance=guider, seeds=SEEDS)
    assert samples.nfe == 6
    for i, record in enumerate(samples.records):
        assert record["scales"] == samples.scales[:, i].tolist()
        scores = np.array(record["scores"]["brightness"])
        assert scores.shape == (3, 3)
        assert record["scales"] == [record["candidates"][k] for k in scores.argmax(axis=1)]
    # The last step's x0 prediction is the image, so that the chosen score is the image's own.
    final = torch.tensor([max(record["scores"]["brightness"][-1]) for record in samples.records])
    torch.testing.assert_close(samples.images.mean(dim=(1, 2, 3)), final, rtol=0, atol=5e-3)


@pytest.mark.slow
def test_it_is_replayed_bit_for_bit(adapter: Adapter) -> None:
    guider = dynamic(adapter, evaluator="none", candidates=(1.0, 2.0, 4.0))
    options: dict[str, Any] = {"num_inference_steps": 4, "seeds": SEEDS, "options": SamplingOptions(batch_size=2)}
    searched = sample(adapter, PROMPTS, guidance=guider, **options)
    again = sample(adapter, PROMPTS, guidance=guider, **options)
    assert torch.equal(searched.images, again.images)  # nothing of the first run is left
    table = TableGuidance(searched.scales.tolist(), branches=searched.records[0]["branches"])
    replayed = sample(adapter, PROMPTS, guidance=table, **options)
    assert torch.equal(searched.images, replayed.images)


def test_the_search_may_cover_a_part_of_the_run(adapter: Adapter) -> None:
    guider = dynamic(adapter, evaluator="none", candidates=(2.0, 4.0), start=0.25, stop=0.75, fallback=1.0)
    samples = sample(adapter, PROMPTS, num_inference_steps=4, guidance=guider, seeds=SEEDS)
    assert samples.scales[0].tolist() == samples.scales[3].tolist() == [1.0] * 3
    assert set(samples.scales[1:3].flatten().tolist()) <= {2.0, 4.0}
    assert samples.records[0]["searched"] == [1, 2]
    assert samples.nfe == 6


def test_settings_survive_saving(tmp_path: Path) -> None:
    guider = DynamicGuidance("some-evaluator", ("preference",), (1.0, 9.0), "linear", start=0.1, fallback=2.0)
    guider.save_pretrained(tmp_path)
    loaded = DynamicGuidance.from_pretrained(tmp_path)
    for name in ("evaluator", "kinds", "candidates", "weighting", "start", "fallback"):
        assert list(np.atleast_1d(loaded.config[name])) == list(np.atleast_1d(guider.config[name])), name
    assert loaded.candidates.tolist() == [1.0, 9.0]


def test_weighting_rules() -> None:
    before = torch.tensor([[1.0, 1.0], [2.0, -2.0]])
    now = torch.tensor([[1.5, 0.5], [3.0, -1.0]])
    expected = torch.tensor([[0.5, 0.0], [0.5, 0.5 / 0.5]])
    torch.testing.assert_close(adaptive([before, now], 0.5, 2, 2), expected / expected.sum(dim=0))
    torch.testing.assert_close(adaptive_signed([before, now], 0.5, 2, 2), torch.tensor([[0.5, -0.5], [0.5, -0.5]]))
    worse = before - 1
    torch.testing.assert_close(adaptive([before, worse], 0.5, 2, 2), torch.full((2, 2), 0.5))
    torch.testing.assert_close(linear([], 0.0, 3, 1)[:, 0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(linear([], 0.75, 3, 1)[:, 0], torch.tensor([0.0, 0.5, 0.5]))
    for name, rule in WEIGHTINGS.items():
        torch.testing.assert_close(rule([], 0.0, 2, 3).sum(dim=0), torch.ones(3), msg=name)


def test_scores_are_standardised_per_noise_level(adapter: Adapter) -> None:
    evaluator = new_evaluator(adapter)
    evaluator.mean += torch.arange(3)[:, None]
    evaluator.std *= 2
    level = torch.tensor([-9.0, 0.0, 9.0])
    assert level_bin(level).tolist() == [0, int(6 / 13 * 16), 15]
    scores = evaluator.standardised({"alignment": level, "fidelity": level, "preference": level}, level)
    torch.testing.assert_close(scores["preference"], (level - 2) / 2)
    assert float(log_snr(torch.tensor(0.5))) == 0
    assert math.isfinite(float(log_snr(torch.tensor(1.0))))


def test_an_evaluator_of_another_model_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    evaluator = LatentEvaluator(EvaluatorSettings(4, 32, 7, 0)).eval()
    guider = DynamicGuidance("none")
    guider.use(evaluator, [])
    with pytest.raises(ValueError, match="evaluator was trained for latents"):
        sample(adapter, PROMPTS, num_inference_steps=2, guidance=guider, seeds=SEEDS)
    guider = DynamicGuidance("none", kinds=("task",))
    guider.use(new_evaluator(adapter), [])
    with pytest.raises(ValueError, match="judges alignment, fidelity, preference, not task"):
        sample(adapter, PROMPTS, num_inference_steps=2, guidance=guider, seeds=SEEDS)
    with pytest.raises(FileNotFoundError, match="expected a folder that 'train evaluator' wrote"):
        sample(adapter, PROMPTS, num_inference_steps=2, guidance=DynamicGuidance("no/such"), seeds=SEEDS)
    saved = new_evaluator(adapter)
    saved.save_pretrained(tmp_path)
    for name, value in LatentEvaluator.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, saved.state_dict()[name])


@pytest.mark.parametrize(
    ("model", "kind"), [("scenes-sdxl", "preference"), ("scenes-sd", "preference"), ("scenes-uneven", "value")]
)
def test_shipped_models_have_an_evaluator(model: str, kind: str) -> None:
    guider = DynamicGuidance(f"{model}-evaluator", (kind,), candidates=(1.5, 3.5))
    prompts = ["two red rings on a dark background", "a large blue star on a light background"]
    drawn = sample(load_adapter(model), prompts, num_inference_steps=2, guidance=guider, seeds=[0, 1])
    assert set(drawn.scales.flatten().tolist()) <= {1.5, 3.5}
    assert torch.tensor(drawn.records[0]["scores"][kind]).isfinite().all()
