"""The table of ways to guide: effective scales against known ones, rows at equal calls, bounds that are bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.evaluation.effective_scale import ScaleMeter
from diffusion_align.evaluation.guidance import GuidanceComparison, looks, sweep
from diffusion_align.evaluation.guidance_rows import Rows, compare_guidance, slopes
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.schedules import ScheduleGuidance, TableGuidance
from diffusion_align.sampling.control import GuidedStep, SamplingOptions
from diffusion_align.sampling.sampler import sample
from tests.brightness import Brightness

PROMPTS = ["a large red star on a dark background", "two small blue rings"]


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(sdxl_folder)


def measured(adapter: Adapter, guidance: Any, steps: int = 4) -> tuple[ScaleMeter, float]:
    meter = ScaleMeter()
    options = SamplingOptions(batch_size=1, on_guided=meter)
    drawn = sample(adapter, PROMPTS, num_inference_steps=steps, guidance=guidance, seeds=[1, 2], options=options)
    return meter, drawn.nfe


@pytest.mark.parametrize(
    ("guidance", "by_step", "nfe"),
    [
        (3.0, [3.0] * 4, 8),
        (TableGuidance([1.0, 2.0, 5.0, 2.0]), [1.0, 2.0, 5.0, 2.0], 7),
        (ScheduleGuidance(6.0, stop=0.5), [6.0, 6.0, 1.0, 1.0], 6),
        (TableGuidance([4.0, 3.0, 2.0, 6.0], stop=0.25), [4.0, 1.0, 1.0, 1.0], 5),
    ],
    ids=["constant", "table", "step-ag", "stopped table"],
)
def test_what_is_measured_is_the_scale_and_costs_no_counted_call(
    guidance: Any, by_step: list[float], nfe: int, adapter: Adapter
) -> None:
    meter, counted = measured(adapter, guidance)
    mean = meter.mean()
    assert mean.by_step == pytest.approx(by_step, rel=1e-3)
    assert mean.scale == pytest.approx(sum(by_step) / 4, rel=1e-3)
    assert mean.orthogonal < 1e-6
    assert counted == nfe


def test_a_guider_that_leaves_the_line_has_an_orthogonal_share(adapter: Adapter) -> None:
    meter, _ = measured(adapter, AdaptiveProjectedGuidance(guidance_scale=5.0, eta=0.0))
    assert meter.mean().orthogonal > 1e-3
    with pytest.raises(ValueError, match="no step was measured"):
        ScaleMeter().mean()


def test_measuring_changes_no_picture(adapter: Adapter) -> None:
    seen: list[GuidedStep] = []
    options = SamplingOptions(on_guided=seen.append)
    plain = sample(adapter, PROMPTS, num_inference_steps=2, guidance=3.0, seeds=[1, 2])
    watched = sample(adapter, PROMPTS, num_inference_steps=2, guidance=3.0, seeds=[1, 2], options=options)
    assert torch.equal(plain.images, watched.images)
    cond, null = seen[1].plain(None)
    torch.testing.assert_close(null + 3 * (cond - null), seen[1].output, rtol=1e-4, atol=1e-5)


def test_guidance_stops_where_it_says_and_is_replayed(adapter: Adapter) -> None:
    options: dict[str, Any] = {"num_inference_steps": 5, "seeds": [1, 2]}
    stopped = sample(adapter, PROMPTS, guidance=ScheduleGuidance(4.0, stop=0.6), **options)
    listed = sample(adapter, PROMPTS, guidance=TableGuidance([4.0, 4.0, 4.0, 1.0, 1.0]), **options)
    assert torch.equal(stopped.images, listed.images)
    assert stopped.nfe == 8
    assert sample(adapter, PROMPTS, guidance=ScheduleGuidance(4.0, stop=0.0), **options).nfe == 5
    with pytest.raises(ValueError, match="stop"):
        ScheduleGuidance(4.0, stop=1.5)


@pytest.mark.slow
def test_the_table_has_every_row_at_equal_calls_and_at_matched_scale(adapter: Adapter) -> None:
    judge = Brightness()
    comparison = GuidanceComparison(adapter, judge, PROMPTS, steps=2, seeds=[0], measured=1, bf16=False)
    dynamic = DynamicGuidance(None, (), (2.0, 4.0), pixel_scorers=("brightness",))
    dynamic.use(scorers=[judge])
    rows = Rows(
        curve=(2.0, 4.0), dynamic={"brightness": dynamic}, per_prompt=(2.0, 4.0), bound=judge, stops=(0.5,),
        usual={"flat": ScheduleGuidance(2.0)}, matched=True,
    )  # fmt: skip
    table = dict(compare_guidance(comparison, 2.0, rows))
    bounds = [name for name, row in table.items() if row["bound"]]
    assert len(bounds) == 3
    assert all(name.startswith("bound: ") for name in bounds)
    calls = {name: row["nfe"] for name, row in table.items()}
    assert calls["static 2"] == calls["mean of the dynamic schedules"] == calls["dynamic, brightness"] == 4
    assert calls["Step AG, first 50%"] == 3
    assert calls["static 2, 1 steps"] == 2  # as many as Step AG's would be 1.5 steps
    assert table["Step AG, first 50%"]["effective_scale"] == pytest.approx(1.5, rel=1e-3)
    assert table["Step AG, first 50%"]["matched"]["scale"] == table["static 1.5"]["nominal_scale"] == 1.5
    assert table["flat"]["matched"]["win_rate"] == table["flat"]["win_rate"] == table["static 2"]["win_rate"]
    best = max(table[f"static {scale}"]["reward"]["mean"] for scale in (2, 4))
    assert table["bound: best of 2 scales per picture, in hindsight"]["reward"]["mean"] >= best
    # The judge picked the candidates of both, so that the bound is the dynamic row itself.
    picked = table["bound: brightness picks each step's candidate"]
    assert picked["reward"] == table["dynamic, brightness"]["reward"]
    assert {"saturation", "clipped"} <= picked["over_static"].keys()


def test_the_curve_tells_how_a_value_grows_with_the_scale() -> None:
    rows = {
        f"static {scale}": {"reward": {"mean": 0.1 * k}, "over_static": {"reward": {}}}
        for k, scale in enumerate((1, 2, 4))
    }
    found = slopes(rows, (4.0, 1.0, 2.0, 8.0))
    assert found["scales"] == [1.0, 2.0, 4.0]
    assert found["per_doubling"]["reward"] == pytest.approx(0.1)
    assert slopes({}, (1.0,)) == {"scales": [], "values": {}, "per_doubling": {}}


def test_looks_of_pictures() -> None:
    images = torch.full((2, 3, 3, 32, 32), 0.5)
    images[0, 0, :, :16] = 1.0
    found = looks(images)
    assert found["clipped"].tolist() == [[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert found["saturation"].abs().max() < 1e-6
    assert found["diversity"].shape == (1, 3)
    assert found["diversity"][0, 0] > 0 == found["diversity"][0, 1]
    assert "diversity" not in looks(images[:1])


def test_settings_are_chosen_by_their_mean_reward(adapter: Adapter) -> None:
    comparison = GuidanceComparison(adapter, Brightness(), PROMPTS, steps=1, bf16=False)
    tried = sweep(comparison, {"low": comparison.guided(1.0), "high": comparison.guided(8.0)})
    assert tried["low"] == pytest.approx(float(comparison.run(comparison.guided(1.0)).reward.mean()))
    assert tried["low"] != tried["high"]
    with pytest.raises(ValueError, match="need measured prompts"):
        next(iter(compare_guidance(comparison, 2.0, Rows(matched=True))))
