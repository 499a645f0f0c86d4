"""Alarms: on screen, in the metrics, in checkpoints; and a run that stops where it was asked to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.engine.loop import TrainResult, run_loop
from diffusion_align.training.engine.metrics import Metrics, WeightedMean
from diffusion_align.training.engine.watching.watchdog import Alarm, Watchdog
from diffusion_align.training.pairs.config import DPOConfig


class Line:
    """One weight, and the folder's only file."""

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.network.weight)
        self.shardable = [self.network]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
        return wrapper(self.network)

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.network.state_dict(), folder / "weights.pt")
        return folder / "weights.pt"


class Counting:
    """Batches 1, 2, 3, ...: a value of all of them, and the batch's own number in its group."""

    def __init__(self, trained: Line) -> None:
        self.trained, self.number = trained, 0

    def batches(self) -> Iterator[Tensor]:
        while True:
            self.number += 1
            yield torch.tensor([[float(self.number)]])

    def loss(self, batch: Tensor) -> tuple[Tensor, Metrics]:
        loss = self.trained.network(batch).square().mean()
        number = batch.flatten()
        weight = torch.cat([number, (number > 3).float()])
        groups = WeightedMean(torch.cat([number, number]) * weight, weight, ("all", "late"))
        return loss, {"loss": loss.detach(), "number/": groups, "number": number.mean()}

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


class Fifth:
    """Says something at every line from the fifth one on, and remembers how many there were."""

    name = "fifth"

    def __init__(self) -> None:
        self.lines = 0

    def judges(self, metrics: Mapping[str, float]) -> bool:
        return "loss" in metrics

    def seen(self, metrics: Mapping[str, float]) -> Alarm | None:
        self.lines += "loss" in metrics
        return Alarm(f"line {self.lines}", stops=self.lines >= 6) if self.lines >= 5 else None

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines = state["lines"]


@pytest.fixture
def config(tmp_path: Path) -> DPOConfig:
    return DPOConfig(output_dir=str(tmp_path / "run"), max_steps=9, logging_steps=1, save_steps=4, report_to="none",
                     progress=False, learning_rate=1e-2)  # fmt: skip


def watched(config: DPOConfig, stop_on: tuple[str, ...] = (), checkpoint: Path | None = None) -> TrainResult:
    trained, watchdog = Line(), Watchdog([Fifth()], stop_on)
    accelerator = build_accelerator(config)
    return run_loop(config, trained, Counting(trained), accelerator, checkpoint=checkpoint, watchdog=watchdog)


def test_an_alarm_is_said_and_logged(config: DPOConfig, capsys: pytest.CaptureFixture[str]) -> None:
    result = watched(config)
    assert (result.stopped, result.step) == (None, 9)
    assert [line["alarm/fifth"] for line in result.history] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert "ALARM at step 5, fifth: line 5\n" in capsys.readouterr().err
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


@pytest.mark.parametrize("stop_on", ["fifth", "alarm"])
def test_it_stops_where_it_may(stop_on: str, config: DPOConfig, capsys: pytest.CaptureFixture[str]) -> None:
    result = watched(config, (stop_on, "another"))
    assert (result.stopped, result.step, result.ended_early) == ("early stopping: fifth", 6, True)
    assert result.weights is not None
    assert "ALARM at step 6, fifth: line 6; the run stops\n" in capsys.readouterr().err


def test_another_rules_name_does_not_stop_it(config: DPOConfig) -> None:
    assert watched(config, ("another",)).step == 9


def test_what_a_rule_remembers_is_in_the_checkpoint(config: DPOConfig, tmp_path: Path) -> None:
    checkpoint = watched(replace(config, max_steps=5)).output_dir / "checkpoint-00000004"
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["watchdog"] == {"stopped": None, "rules": {"fifth": {"lines": 4}}}
    again = watched(replace(config, output_dir=str(tmp_path / "again"), max_steps=8), ("fifth",), checkpoint)
    assert [line["step"] for line in again.history if line["alarm/fifth"]] == [5, 6]
    assert again.stopped == "early stopping: fifth"


def test_a_stopped_run_stays_so_unless_it_may_go_on() -> None:
    state = {"stopped": "fifth", "rules": {"fifth": {"lines": 6}}}
    for stop_on, expected in ((("fifth",), "fifth"), (("alarm",), "fifth"), ((), None), (("another",), None)):
        watchdog = Watchdog([Fifth()], stop_on)
        watchdog.load_state_dict(state)
        assert watchdog.stopped == expected
        assert watchdog.state_dict()["rules"] == state["rules"]


def test_means_of_some_examples_are_weighted(config: DPOConfig) -> None:
    history = watched(replace(config, logging_steps=3, gradient_accumulation_steps=1)).history
    assert [line["number"] for line in history] == [2, 5, 8]
    assert [line["number/all"] for line in history] == pytest.approx([14 / 6, 77 / 15, 194 / 24])
    assert "number/late" not in history[0]
    assert [line["number/late"] for line in history[1:]] == [5, 8]
