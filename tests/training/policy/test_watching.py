"""The rules that runs are watched by: each fires on a planted case, and is quiet where nothing has changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.evaluation.report import Report
from diffusion_align.process import VariancePreserving
from diffusion_align.process.outputs import OUTPUTS
from diffusion_align.process.path import scaled_linear
from diffusion_align.training.engine.watching.watchdog import Alarm
from diffusion_align.training.online.config import GRPOConfig
from diffusion_align.training.pairs.config import DPOConfig, SFTConfig
from diffusion_align.training.policy.watching.divergence import DivergenceProbe, step_divergence
from diffusion_align.training.policy.watching.picture_watch import PictureWatch, ensemble_spread, standardised
from diffusion_align.training.policy.watching.timestep_bins import TimestepBins
from diffusion_align.training.policy.watching.watch_building import ValidationRules, build_watchdog
from diffusion_align.training.policy.watching.watch_report import add_watching
from diffusion_align.training.policy.watching.watch_rules import (
    ArtefactRule,
    DivergenceRule,
    EntanglementRule,
    HeldOutRule,
    SpreadRule,
)

PROMPTS = 16


def validations(rule: HeldOutRule, scores: Sequence[Sequence[float]], rewards: Sequence[float]) -> list[bool]:
    """Whether there is an alarm at each validation; ``rewards`` are logged in between."""
    found = []
    for number, each in enumerate(scores):
        found.append(rule.seen(rule.measure(each)) is not None)
        if number < len(rewards):
            assert rule.seen({"reward": rewards[number]}) is None
    return found


def test_a_reward_that_rises_while_held_out_scorers_fall_is_an_alarm() -> None:
    scores = np.random.default_rng(0).normal(size=PROMPTS)
    falling = [list(scores - 0.5 * step + 0.1 * step * np.cos(np.arange(PROMPTS))) for step in range(5)]
    rising = [1.0, 2.0, 3.0, 4.0]
    assert validations(HeldOutRule(), falling, rising) == [False, False, False, False, True]
    assert validations(HeldOutRule(), falling, [1.0, 0.9, 0.8, 0.7]) == [False] * 5  # the reward falls, too
    recovered = [*falling[:3], list(scores + 1), *falling[1:3]]
    assert validations(HeldOutRule(), recovered, [*rising, 5.0]) == [False] * 6


def test_a_resumed_held_out_rule_goes_on() -> None:
    scores = [[0.0, 1.0, 2.0 + 0.1 * step] if step == 0 else [-1.0 * step, 0.0, 1.2] for step in range(4)]
    whole, first = HeldOutRule(), HeldOutRule()
    expected = validations(whole, scores, [1.0, 2.0, 3.0])
    validations(first, scores[:2], [1.0, 2.0])
    second = HeldOutRule()
    second.load_state_dict(first.state_dict())
    assert expected[2:] == validations(second, scores[2:], [3.0])
    assert second.state_dict() == whole.state_dict()


def test_held_out_scorers_of_the_base_against_itself_are_quiet() -> None:
    """200 runs of four validations, each by pictures of other seeds, with a reward that is as much chance."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(200):
        prompts = rng.normal(size=PROMPTS)
        scores = [list(prompts + rng.normal(size=PROMPTS)) for _ in range(4)]
        alarms += any(validations(HeldOutRule(), scores, list(rng.normal(size=4))))
    assert alarms <= 4


def test_held_out_scores_are_standardised_by_the_base() -> None:
    base, policy = [1.0, 3.0], [5.0, 3.0]
    assert standardised([((policy, base), True), (([0.0, 0.0], [2.0, 4.0]), False)]) == [3.0, 2.0]
    rule = HeldOutRule()
    assert rule.measure([0.0, 1.0]) == {"eval/held_out": 0.5}
    found = rule.measure([1.0, 4.0])
    assert found == {"eval/held_out": 2.5, "eval/held_out_change": 2.0, "eval/held_out_error": 1.0}


def test_an_ensemble_that_disagrees_is_an_alarm() -> None:
    rng = np.random.default_rng(1)
    quality = rng.normal(size=PROMPTS)
    base = [quality + 0.3 * rng.normal(size=PROMPTS) for _ in range(3)]
    apart = [scores + 3 * shift for scores, shift in zip(base, (-1, 0, 1), strict=True)]
    metrics = ensemble_spread([((list(own), list(theirs)), True) for own, theirs in zip(apart, base, strict=True)])
    alarm = SpreadRule().seen(metrics)
    assert alarm is not None
    assert "times as much as on the base's" in alarm.text
    quiet = 0
    for _ in range(200):
        again = [(list(quality + 0.3 * rng.normal(size=PROMPTS)), list(theirs)) for theirs in base]
        quiet += SpreadRule().seen(ensemble_spread([(both, True) for both in again])) is None
    assert quiet >= 196


def test_the_spread_is_the_deviation_over_the_members() -> None:
    first, second = ([2.0, 0.0], [0.0, 2.0]), ([0.0, 0.0], [0.0, 4.0])
    # In the base's units: (1, -1) and (-1, -1), so 1 and 0; on the base both agree.
    assert ensemble_spread([(first, True), (second, True)]) == {"eval/ensemble_spread": 0.5}
    # A member whose lower scores are better: (1, -1) and (1, 1), on the base (-1, 1) and (1, -1).
    found = ensemble_spread([(first, True), (second, False)])
    assert found == {"eval/ensemble_spread": 0.5, "eval/spread_ratio": 0.5, "eval/spread_errors": -1.0}


def entangled(share: float, up: float) -> dict[str, float]:
    return {"kappa_above_1": share, "chosen_error_up": up}


def test_entanglement_is_an_alarm_at_the_third_line() -> None:
    rule = EntanglementRule()
    assert [rule.seen(entangled(0.7, 0.7)) is not None for _ in range(4)] == [False, False, True, True]
    assert rule.seen({"eval/reward": 1.0}) is None  # a validation in between changes nothing
    again = EntanglementRule()
    again.load_state_dict(rule.state_dict())
    assert again.seen(entangled(0.7, 0.7)) is not None
    for quiet in (entangled(0.4, 0.7), entangled(0.7, 0.5)):
        assert [EntanglementRule().seen(quiet) for _ in range(4)] == [None] * 4
        assert rule.seen(quiet) is None
        assert rule.seen(entangled(0.7, 0.7)) is None


def test_entanglement_of_the_base_against_itself_is_quiet() -> None:
    """200 runs of six lines of 40 pairs: errors differ by chance alone, gradients are those of close pictures."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(200):
        rule = EntanglementRule()
        for _ in range(6):
            share = (rng.normal(size=40) > 0).mean()
            alarms += rule.seen(entangled(float(share), float((rng.normal(size=40) > 0).mean()))) is not None
    assert alarms <= 4


def picture(name: str, alarmed: bool) -> dict[str, float]:
    return {f"eval/picture_{name}": 5.0, f"eval/picture_{name}_moved": 2.5, f"alarm/picture_{name}": float(alarmed)}


def validated(rule: ArtefactRule, **out: bool) -> Alarm | None:
    """What the rule says of a validation at which these figures were out of bounds, or not."""
    rule.count(out)
    line: dict[str, float] = {}
    for name, alarmed in out.items():
        line |= picture(name, alarmed)
    return rule.seen(line)


def test_an_artefact_is_an_alarm_at_once_and_stops_the_second_time() -> None:
    rule = ArtefactRule()
    first = validated(rule, stipple=True, dark=False)
    assert first is not None
    assert (first.stops, first.text) == (False, "stipple 5 (+2.50 times as far from the base's as it may move)")
    again = ArtefactRule()
    again.load_state_dict(rule.state_dict())
    other, second = validated(rule, dark=True), validated(again, stipple=True)
    assert other is not None
    assert second is not None
    assert (other.stops, second.stops) == (False, True)
    assert validated(again, stipple=False) is None
    assert again.seen({"loss": 1.0}) is None
    first = validated(again, stipple=True)
    assert first is not None
    assert not first.stops


def test_pictures_are_measured_against_the_base() -> None:
    base = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    watch = PictureWatch()
    assert not any(value for name, value in watch(base, base).items() if name.startswith("alarm/"))
    darker = watch(base * 0.03, base)
    assert (darker["eval/picture_dark"], darker["alarm/picture_dark"]) == (1.0, 1.0)
    assert darker["eval/picture_dark_moved"] == pytest.approx(1 / 0.01, rel=0.01)
    assert watch.rule.seen(darker) is not None


def test_a_spent_budget_is_an_alarm() -> None:
    alarm = DivergenceRule(2.0).seen({"eval/kl": 2.5})
    assert alarm is not None
    assert alarm.text == "the divergence from the base is 2.5, above the 2 of kl_budget"
    assert DivergenceRule(2.0).seen({"eval/kl": 2.0}) is None
    assert DivergenceRule(2.0).seen({"loss": 3.0}) is None


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_divergence_of_a_step_is_that_of_two_gaussians(kind: str) -> None:
    """DDPM's posterior means from both predictions, straight from its paper (2006.11239, eq. 7), in float64."""
    table, generator = scaled_linear(), torch.Generator().manual_seed(0)
    path = VariancePreserving(table.float(), OUTPUTS[kind])
    t = torch.tensor([1, 40, 500, 999])
    x, policy, reference = torch.randn(3, 4, 4, 2, 2, generator=generator, dtype=torch.float64)
    ab, before = table[t].view(-1, 1, 1, 1), table[t - 1].view(-1, 1, 1, 1)
    beta = 1 - ab / before

    def mean(output: torch.Tensor) -> torch.Tensor:
        eps = output if kind == "epsilon" else ab.sqrt() * output + (1 - ab).sqrt() * x
        x0 = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
        return (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - ab)

    variance = (1 - before) / (1 - ab) * beta
    expected = ((mean(policy) - mean(reference)).square() / (2 * variance)).sum(dim=(1, 2, 3))
    found = step_divergence(path, (policy - reference).square().sum(dim=(1, 2, 3)), t)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=2e-2)  # the table is float32
    assert step_divergence(path, torch.ones(1), torch.tensor([0])).item() == 0


def probe(adapter: Adapter) -> DivergenceProbe:
    return DivergenceProbe(adapter, ["a small red disc", "two blue rings"], 64, 4, 3.0, 7, TimestepBins(2, 1000))


@pytest.mark.slow
def test_the_divergence_of_sampling_is_zero_at_the_base_and_grows(sd_v_folder: Path) -> None:
    adapter = load_adapter(sd_v_folder)
    adapter.train_lora(rank=2)
    assert probe(adapter)() == {"eval/kl": 0.0, "eval/kl/t0-499": 0.0, "eval/kl/t500-999": 0.0}
    found = []
    for size in (0.05, 0.1):
        generator = torch.Generator().manual_seed(0)
        for parameter in adapter.trainable_parameters().values():
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
        found.append(probe(adapter)())
    assert 0 < found[0]["eval/kl"] < found[1]["eval/kl"]
    assert found[1]["eval/kl"] == pytest.approx(found[1]["eval/kl/t0-499"] + found[1]["eval/kl/t500-999"])
    assert probe(adapter)() == found[1]


def test_figures_are_averaged_by_timestep() -> None:
    bins = TimestepBins(3, 1000)
    assert [bins.name(index) for index in range(3)] == ["t0-333", "t334-666", "t667-999"]
    times = torch.arange(1000)
    assert [int((bins.of(times) == index).sum()) for index in range(3)] == [334, 333, 333]
    means = bins.means(torch.tensor([0, 333, 999]), {"a": torch.tensor([1.0, 3.0, math.inf])})["a/"]
    assert (means.total.tolist(), means.weight.tolist()) == ([4.0, 0.0, math.inf], [2, 0, 1])
    assert TimestepBins(0, 1000).means(times, {"a": times}) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: DPOConfig(stop_on=("spread",)), "stop_on has spread, which dpo does not watch"),
        (lambda: SFTConfig(stop_on=("entanglement",)), "stop_on has entanglement, which sft does not watch"),
        (lambda: DPOConfig(stop_on=("held_out",), held_out_scorers=("a",)), "needs at least 2 held_out_scorers"),
        (lambda: DPOConfig(stop_on=("artefacts",)), "stop_on artefacts needs validation: set eval_steps"),
        (lambda: DPOConfig(stop_on=("artefacts",), num_validation_prompts=4, eval_steps=1), "of at least 12"),
        (lambda: DPOConfig(artefact_monitor=True), "artefact_monitor needs eval_steps, and num_validation_prompts"),
        (lambda: DPOConfig(stop_on=("kl_budget",), eval_steps=1), "stop_on kl_budget needs a kl_budget"),
        (lambda: DPOConfig(kl_budget=1.0, eval_steps=1), "kl_budget = 1 needs kl_prompts, e.g. 8, and eval_steps"),
        (lambda: GRPOConfig(stop_on=("spread",), eval_steps=1), "stop_on spread needs an ensemble"),
        (lambda: DPOConfig(entanglement_steps=1, torch_compile=True), "set torch_compile to false"),
    ],
)
def test_settings_that_cannot_work_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config().check()


def test_margins_that_are_large_at_the_start_are_an_alarm() -> None:
    watchdog = build_watchdog(DPOConfig(logging_steps=20), ValidationRules())
    large, small = ({"abs_margin": u, "gradient_factor": 0.4, "margin": u} for u in (3.1, 2.9))
    assert watchdog.seen(20, small)["alarm/large_margins"] == 0
    assert watchdog.seen(40, large)["alarm/large_margins"] == 1
    assert "mean |u| is 3.1 in the first 50 steps, and the mean gradient factor sig(-u) 0.4" in watchdog.said[0]
    assert "alarm/large_margins" not in watchdog.seen(60, large)  # what was learnt may be told apart
    assert "alarm/large_margins" not in watchdog.seen(20, {"reward": 1.0})
    seldom = build_watchdog(DPOConfig(logging_steps=100, stop_on=("large_margins",)), ValidationRules())
    seldom.seen(100, large)
    assert seldom.stopped == "large_margins"


def test_every_rule_that_may_stop_a_run_is_there() -> None:
    for config in (DPOConfig(kl_budget=1.0), GRPOConfig(kl_budget=1.0)):
        names = {rule.name for rule in build_watchdog(config, ValidationRules.of(config)).rules}
        assert config.stop_rules - {"alarm"} <= names


def test_the_best_weights_are_the_held_out_means_where_it_may_stop_the_run() -> None:
    scorers = ("a", "b")
    assert DPOConfig(held_out_scorers=scorers).best_metric == "eval/reward"
    assert DPOConfig(held_out_scorers=scorers, stop_on=("held_out",)).best_metric == "eval/held_out"
    named = DPOConfig(held_out_scorers=scorers, stop_on=("alarm",), metric_for_best_model="eval/a")
    assert named.best_metric == "eval/a"
    assert DPOConfig(stop_on=("alarm",)).best_metric == "eval/reward"


@pytest.mark.slow
def test_the_report_lists_alarms() -> None:
    report, quiet = Report("run"), Report("run")
    add_watching(report, [{"step": 4, "alarm/held_out": 0.0}, {"step": 8, **picture("dark", True)}])
    assert "<td>picture_dark</td>" in report.html()
    add_watching(quiet, [{"step": 4, "alarm/kl_budget": 0.0}])
    assert "None." in quiet.html()
