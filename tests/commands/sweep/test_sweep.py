"""``diffusion-align sweep``: which runs a file or flags make, that they go on, and what they come to."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_align.adapters import load_adapter
from diffusion_align.cli import main
from diffusion_align.commands.sweep.outcomes import ranked, rows, told, write_results
from diffusion_align.commands.sweep.running import OUTCOME, SETTINGS, run_all
from diffusion_align.commands.sweep.spec import Run, Sweep, combinations, load_sweep, planned
from diffusion_align.commands.sweep.sweep_options import SweepOptions
from diffusion_align.commands.sweep.winner import OTHER_NOISE, WINNER, Winner, check_winner, looked_at
from diffusion_align.data.prompts import training_prompts
from diffusion_align.evaluation.compare import SamplingSettings, compare, sample_and_score
from diffusion_align.rewards import load_scorer
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.run import train

FAST = ("max_steps=4", "eval_steps=4", "validation_scorer=scenes-oracle")


def options(out: Path, **given: Any) -> SweepOptions:
    return SweepOptions(**{"base": "dpo", "values": ("beta=500,2000",), "set": FAST, "out": str(out), **given})


def plan(out: Path, **given: Any) -> tuple[Sweep, list[Run]]:
    sweep = load_sweep(options(out, **given))
    return sweep, planned(sweep)


def file(folder: Path, **said: Any) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(said))
    return str(path)


# -- which runs


def test_a_grid_is_every_combination_with_every_seed(tmp_path: Path) -> None:
    _, runs = plan(tmp_path, values=("beta=500,2000", "loss_type=sigmoid,ipo"), seeds=(0, 7))
    found = [(run.config.beta, run.config.loss_type, run.config.seed) for run in runs]  # type: ignore[attr-defined]
    assert found == [(beta, loss, seed) for beta in (500, 2000) for loss in ("sigmoid", "ipo") for seed in (0, 7)]
    assert runs[3].folder.name == "003-beta=500-loss_type=ipo-seed=7"
    assert len({run.folder for run in runs}) == 8
    assert {run.config.max_steps for run in runs} == {4}


def test_random_settings_are_of_their_ranges_and_the_same_every_time(tmp_path: Path) -> None:
    said: dict[str, Any] = {
        "base": "dpo", "method": "random", "run_cap": 40,
        "parameters": {
            "learning_rate": {"min": "1e-5", "max": "1e-3", "distribution": "log_uniform_values"},
            "lora_rank": {"min": 4, "max": 6},
            "loss_type": {"values": ["sigmoid", "ipo"]},
        },
    }  # fmt: skip
    sweep = load_sweep(SweepOptions(file=file(tmp_path, **said)))
    tried = combinations(sweep)
    assert len(tried) == 40
    assert combinations(sweep) == tried
    assert {each["lora_rank"] for each in tried} == {4, 5, 6}
    assert {each["loss_type"] for each in tried} == {"sigmoid", "ipo"}
    powers = [math.log10(each["learning_rate"]) for each in tried]
    assert -5 <= min(powers) < -4.5
    assert -3.5 < max(powers) <= -3  # evenly over the powers of ten: linear draws would nearly all be above -4
    assert sum(power < -4 for power in powers) > 10


def test_listed_runs_and_flags_that_take_the_files_place(tmp_path: Path) -> None:
    path = file(tmp_path, base="dpo", method="list", runs=[{"beta": 5.0}, {"lora_rank": 4}], seeds=[3],
                settings={"max_steps": 9}, metric={"name": "loss", "goal": "minimize"})  # fmt: skip
    sweep = load_sweep(SweepOptions(file=path, set=("max_steps=2",), seeds=(1,)))
    assert [(run.tried, run.config.seed, run.config.max_steps) for run in planned(sweep)] == [
        ({"beta": 5.0}, 1, 2),
        ({"lora_rank": 4}, 1, 2),
    ]
    assert (sweep.metric, sweep.maximize, sweep.out) == ("loss", False, Path("runs/sweep"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"values": ("betta=1,2",)}, "unknown key 'betta'; did you mean 'beta'"),
        ({"set": (*FAST, "lora_rnk=1")}, "unknown key 'lora_rnk'; did you mean 'lora_rank'"),
        ({"values": ("beta=1,no",)}, "run 1 .beta=.*: beta = .* is wrong"),
        ({"values": ("output_dir=a,b",)}, "each run has a folder of its own"),
        ({"values": ("seed=1,2",)}, "give seeds"),
        ({"values": ("max_steps=1,2",)}, "both tried .* and fixed"),
        ({"values": ("beta",)}, "expected NAME=VALUE"),
        ({"values": ()}, "needs parameters"),
        ({"set": ("max_steps=4",)}, "needs validation: set eval_steps, e.g. to max_steps = 4"),
        ({"set": ("eval_steps=4",)}, "needs validation_scorer"),
        ({"run_cap": 1}, "2 settings are more than run_cap = 1"),
        ({"method": "random"}, "needs run_cap"),
        ({"seeds": (1, 1)}, "each of them once"),
        ({"base": None}, "base is missing"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_files_unknown_keys_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key 'parameter'; did you mean 'parameters'"):
        load_sweep(SweepOptions(file=file(tmp_path, base="dpo", parameter={})))
    with pytest.raises(ValueError, match="parameters: beta: unknown key 'value_s'; did you mean 'values'"):
        load_sweep(SweepOptions(file=file(tmp_path, base="dpo", parameters={"beta": {"value_s": [1]}})))


def test_a_dry_run_says_runs_and_cost_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--base", "dpo", "--values", "beta=500,2000", "--set", *FAST, "--seeds", "0", "1", "--out", str(out)]
    assert main(["sweep", *flags, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "001-beta=500-seed=1" in said
    assert "4 runs" in said
    # 4 runs x 4 steps x 1 pair x 2 pictures x (3 + 1 of the reference)
    assert "16 optimiser steps, 16 training examples, 128 calls" in said
    assert not out.exists()


# -- doing them


class Trainer:
    """Stands for the processes of runs: writes what a run would log, or fails; remembers what was started."""

    def __init__(self, rates: Mapping[float, float], failing: Sequence[int] = ()) -> None:
        self.rates, self.failing = rates, failing
        self.started: list[tuple[str, list[str], str | None]] = []

    def __call__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str], held: int
    ) -> subprocess.Popen[bytes]:
        folder = log.parent
        self.started.append((folder.name, list(arguments), environment.get("CUDA_VISIBLE_DEVICES")))
        if int(folder.name[:3]) in self.failing:
            log.write_text("a warning\nerror: no space left\n")
            return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
        settings = yaml.safe_load((folder / SETTINGS).read_text())
        rate = self.rates[settings["beta"]] + 0.01 * settings["seed"]
        line = {"step": 4, "eval/win_rate": rate, "eval/win_rate_low": rate - 0.1, "eval/win_rate_high": rate + 0.1}
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": 1.0}) + "\n" + json.dumps(line) + "\n")
        return subprocess.Popen(["true"])


def test_runs_that_are_done_stay_and_failed_ones_are_rows_and_tried_again(tmp_path: Path) -> None:
    sweep, runs = plan(tmp_path, seeds=(0, 1))
    first = Trainer({500: 0.6, 2000: 0.7}, failing=[2])
    assert run_all(runs, first) == 1
    assert [name[:3] for name, *_ in first.started] == ["000", "001", "002", "003"]  # the failed one was not the end
    best, other = ranked(sweep, runs)
    assert (best.tried, best.seeds) == ({"beta": 2000}, [1])
    assert best.problems == ["002-beta=2000-seed=0: error: no space left"]
    assert other.mean == pytest.approx(0.605)
    assert (other.low, other.high) == (pytest.approx(0.505), pytest.approx(0.705))

    second = Trainer({500: 0.6, 2000: 0.7})
    assert run_all(runs, second) == 0
    assert [name[:3] for name, *_ in second.started] == ["002"]
    assert ranked(sweep, runs)[0].mean == pytest.approx(0.705)
    assert run_all(runs, Trainer({})) == 0


def test_a_run_with_a_checkpoint_goes_on(tmp_path: Path) -> None:
    _, runs = plan(tmp_path)
    (runs[0].folder / "checkpoint-00000002").mkdir(parents=True)
    trainer = Trainer({500: 0.6, 2000: 0.7})
    run_all(runs, trainer)
    assert trainer.started[0][1][-2:] == ["--resume-from-checkpoint", "latest"]
    assert "--resume-from-checkpoint" not in trainer.started[1][1]


def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run_all(plan(tmp_path)[1], Trainer({500: 0.6, 2000: 0.7}))
    trainer = Trainer({})
    with pytest.raises(ValueError, match="holds a run of other settings, max_steps was 4 and is 5"):
        run_all(plan(tmp_path, set=("max_steps=5", *FAST[1:]))[1], trainer)
    assert not trainer.started
    assert run_all(plan(tmp_path, metric="loss", goal="minimize")[1], trainer) == 0  # another metric of the same runs
    settings = plan(tmp_path)[1][0].folder / SETTINGS
    settings.write_text("".join(line for line in settings.open() if "lora_rank" not in line))  # of an earlier version
    assert run_all(plan(tmp_path)[1], trainer) == 0


def test_devices_are_taken_in_turn(tmp_path: Path) -> None:
    sweep, runs = plan(tmp_path, seeds=(0, 1), devices=("2", "3"))
    trainer = Trainer({500: 0.6, 2000: 0.7})
    assert run_all(runs, trainer, sweep.jobs, sweep.devices) == 0
    assert sweep.jobs == 2
    assert {device for *_, device in trainer.started} == {"2", "3"}


def test_the_table_the_results_and_the_report(tmp_path: Path) -> None:
    sweep, runs = plan(tmp_path, seeds=(0, 1))
    run_all(runs, Trainer({500: 0.8, 2000: 0.7}))
    results = ranked(sweep, runs)
    write_results(sweep, runs, results, "the best one again: 61%")
    assert [row["beta"] for row in rows(sweep, results)] == ["500", "2000"]
    text = told(sweep, results)
    assert text.index("0.805") < text.index("0.705")
    assert "[0.705, 0.905]" in text
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["results"][0]["mean"] == pytest.approx(0.805)
    page = (tmp_path / "report.html").read_text()
    assert "[0.705, 0.905]" in page
    assert "the best one again: 61%" in page


def test_a_metric_that_no_run_logs_names_near_ones(tmp_path: Path) -> None:
    sweep, runs = plan(tmp_path, metric="eval/winrate")
    run_all(runs, Trainer({500: 0.8, 2000: 0.7}))
    results = ranked(sweep, runs)
    assert results[0].mean is None
    assert "logged no eval/winrate; near: eval/win_rate" in results[0].problems[0]
    assert "eval/winrate" in told(sweep, results)


@pytest.mark.slow
def test_a_true_run(tmp_path: Path, sdxl_folder: Path, pairs_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A process trains; the second sweep over it starts nothing."""
    flags = [
        "sweep", "--base", "dpo", "--values", "beta=500", "--metric", "loss", "--goal", "minimize",
        "--out", str(tmp_path / "s"), "--set", f"model={sdxl_folder}", f"dataset={pairs_folder}", "max_steps=1",
        "logging_steps=1", "lr_scheduler_type=constant", "warmup_steps=0", "final_pictures=0",
    ]  # fmt: skip
    assert main(flags) == 0
    assert "0.6931" in capfd.readouterr().out  # log 2, before the first step
    ended = (tmp_path / "s" / "000-beta=500" / OUTCOME).read_text()
    assert main(flags) == 0
    assert "starts" not in capfd.readouterr().err
    assert (tmp_path / "s" / "000-beta=500" / OUTCOME).read_text() == ended


@pytest.mark.slow
def test_the_winner_is_looked_at_on_other_prompts_with_other_noise(
    tmp_path: Path, sdxl_folder: Path, pairs_folder: Path
) -> None:
    settings = (
        f"model={sdxl_folder}", f"dataset={pairs_folder}", "max_steps=1", "learning_rate=0.1", "warmup_steps=0",
        "lr_scheduler_type=constant", "report_to=none", "eval_steps=1", "validation_scorer=scenes-oracle",
        "num_validation_prompts=2", "validation_inference_steps=2",
    )  # fmt: skip
    sweep, runs = plan(tmp_path, values=("beta=500",), set=settings)
    config = runs[0].config
    assert isinstance(config, DPOConfig)
    train(replace(config, eval_steps=0))
    found = looked_at(runs[0].folder, config)
    assert (found.prompts, found.other_prompts) == (2, True)

    prompts = training_prompts(str(pairs_folder), "validation")[2:]
    assert len(prompts) == 2
    drawn = SamplingSettings(2, config.validation_guidance_scale, config.validation_seed + OTHER_NOISE)
    scorer = load_scorer("scenes-oracle")
    sides = [
        sample_and_score(adapter, prompts, scorer, drawn)
        for adapter in (load_adapter(sdxl_folder).load_weights(runs[0].folder), load_adapter(sdxl_folder))
    ]
    assert not sides[0].images.equal(sides[1].images)
    rate = compare(*sides)
    assert (found.win_rate, found.low, found.high) == (rate.rate, *rate.interval)

    line = {"step": 1, "eval/win_rate": 0.5, "eval/win_rate_low": 0.2, "eval/win_rate_high": 0.8}
    (runs[0].folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (runs[0].folder / OUTCOME).write_text(json.dumps({"status": 0, "seconds": 1.0}))
    assert check_winner(sweep, ranked(sweep, runs), runs) == found
    assert Winner(**json.loads((tmp_path / WINNER).read_text())) == found
