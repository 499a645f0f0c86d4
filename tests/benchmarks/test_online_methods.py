"""Methods on the embedded world: which runs there are, what they cost, and how gains of several draws are counted."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.scenes import online_methods
from diffusion_align.evaluation.compare import Sampled, SamplingSettings
from diffusion_align.rewards import RewardOutput
from diffusion_align.training.settings import load_recipe


def scored(rewards: list[float]) -> Sampled:
    return Sampled(torch.zeros(len(rewards), 3, 4, 4), RewardOutput(torch.tensor(rewards)))


def test_draws_of_a_prompt_are_one_observation_of_it() -> None:
    exam = online_methods.Exam(["a", "b", "c"] * 2, None, SamplingSettings(), scored([0.0] * 6))
    gains = exam.gains(scored([1.0, 2.0, -3.0, 3.0, -2.0, 6.0]))
    found = online_methods.compared([online_methods.as_numbers(online_methods.as_texts(gains, draws=2))])
    assert found["oracle_gain"] == pytest.approx(7 / 6)  # means of a, b and c: 2, 0 and 1.5
    spread = torch.tensor([2.0, 0.0, 1.5]).std(correction=0)
    assert found["oracle_gain_standard_error"] == pytest.approx(spread / 3**0.5)
    assert found["win_rate"]["rate"] == pytest.approx(4 / 6)
    assert found["win_rate_by_seed"] == [pytest.approx(4 / 6)]
    assert found["oracle_gain_by_seed"] == [pytest.approx(7 / 6)]


def fake_run(gains: list[float]) -> dict[str, Any]:
    texts = {"own": online_methods.as_texts(np.array(gains), 1)}
    return {"gains": texts, "proxy_gain": gains[0], "aspects_gain": {"aesthetic": gains[0]}, "train_seconds": 1}


def test_seeds_join_a_row_and_other_settings_begin_it_anew() -> None:
    args = argparse.Namespace(prompts=2, draws=1)
    config = load_recipe("scenes_flow_raft")
    assert isinstance(config, online_methods.Measured)
    one = online_methods.with_run({}, "raft", config, 3, fake_run([0.1, 0.3]), args)
    both = online_methods.with_run(one, "raft", replace(config, seed=7), 1, fake_run([0.5, -0.1]), args)
    row = both["rows"]["raft"]
    assert row["seeds"] == [1, 3]
    assert row["oracle_gain"] == pytest.approx(0.2)
    assert row["oracle_gain_by_seed"] == pytest.approx([0.2, 0.2])
    assert row["oracle_gain_standard_error"] == pytest.approx(0.1 / 2**0.5)  # the prompts' means: 0.3 and 0.1
    assert row["proxy_gain"] == pytest.approx(0.3)
    assert set(online_methods.runs_of(both, "raft", config, args)) == {"1", "3"}
    for other in (replace(config, learning_rate=1.0), replace(config, dataset="elsewhere")):
        anew = online_methods.with_run(both, "raft", other, 2, fake_run([0.0, 0.0]), args)
        assert anew["rows"]["raft"]["seeds"] == [2]
    more = argparse.Namespace(prompts=2, draws=2)
    assert online_methods.runs_of(both, "raft", config, more) == {}
    assert online_methods.with_run(both, "nft", config, 0, fake_run([0.0, 0.0]), args)["rows"].keys() == {"raft", "nft"}


def test_runs_that_are_in_the_file_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[int] = []

    def run(name: str, config: Any, *_: object) -> dict[str, Any]:
        done.append(config.seed)
        return fake_run([0.1, 0.3])

    monkeypatch.setattr(online_methods, "measure", run)
    monkeypatch.setattr(online_methods, "prepare_exams", lambda *_: {})
    command = ["--model", "scenes-flow", "--methods", "raft", "--out", str(tmp_path / "rows.json"), "--seeds"]
    online_methods.main([*command, "1"])
    online_methods.main([*command, "1", "2"])
    assert done == [1, 2]
    assert "raft, seed 1: is in" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text())["rows"]["raft"]["seeds"] == [1, 2]


@pytest.mark.parametrize("model", online_methods.BASES)
@pytest.mark.parametrize("method", online_methods.METHODS)
def test_each_base_has_a_recipe_of_each_method_and_its_cost_is_known(model: str, method: str) -> None:
    config = load_recipe(online_methods.recipe_of(online_methods.BASES[model], method))
    assert config.model == model
    assert isinstance(config, online_methods.Measured)
    assert online_methods.denoiser_calls(config) > 0


def test_inpainting_is_not_measured_beside_a_flow_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        online_methods.main(["--model", "scenes-flow", "--trust", "none"])
    assert "--trust measures an inpainting model beside scenes-sdxl" in capsys.readouterr().err
