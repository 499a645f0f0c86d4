"""Win rates on pairs of others' pictures: what a file of results says, and that a run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scenes.off_policy import METHODS, main, summarize


def found(outcomes: str, step: int) -> dict[str, object]:
    return {"outcomes": outcomes, "scores": {"fidelity": 0.5}, "pairs": 24 * step, "denoiser_calls": 96 * step}


def test_the_way_to_the_last_win_rate_of_dpo() -> None:
    dpo = {"20": found("WWLL", 20), "40": found("WWWL", 40)}  # 0.5, 0.75
    fast = {"20": found("WWWW", 20), "40": found("LLLL", 40)}
    late = {"20": found("WLLL", 20), "40": found("WWTT", 40)}  # 0.25, 0.75
    rows = {"x, dpo, seed 0": dpo, "x, fast, seed 0": fast, "x, late, seed 0": late, "y, fast, seed 0": fast}
    summary = summarize(rows)
    assert "to_dpo" not in summary["y"]
    told = summary["x"]["to_dpo"]
    assert (told["fast"]["reached_at_step"], told["fast"]["in_half_the_steps"]) == (20, True)
    assert (told["late"]["reached_at_step"], told["late"]["in_half_the_steps"]) == (40, False)
    assert told["late"]["half_minus_final"] == pytest.approx(0.25 - 0.75)
    assert summary["x"]["curves"]["dpo"]["40"]["win_rate"] == 0.75
    # Between 20 and 40 lies half of 60.
    longer = {**dpo, "60": found("WWWL", 60)}
    told = summarize(rows | {"x, dpo, seed 0": longer})["x"]["to_dpo"]
    assert (told["late"]["reached_at_step"], told["late"]["half"], told["late"]["in_half_the_steps"]) == (40, 40, None)
    never = {"40": found("LLLL", 40)}
    told = summarize({"x, dpo, seed 0": longer, "x, never, seed 0": never})["x"]["to_dpo"]["never"]
    assert (told["reached_at_step"], told["in_half_the_steps"]) == (None, False)
    # Seeds are one point, prompt by prompt.
    both = summarize(rows | {"x, dpo, seed 1": {"40": found("LLLL", 40)}})["x"]
    assert both["curves"]["dpo"]["40"]["seeds"] == 2
    assert both["to_dpo"]["late"]["dpo_win_rate"] == pytest.approx(0.375)


@pytest.mark.slow
def test_more_steps_go_on_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "dpo", ("scenes_dpo", {"per_device_train_batch_size": 4}))

    def measured(name: str, steps: int) -> dict[str, object]:
        files = ["--work", str(tmp_path / name), "--out", str(tmp_path / f"{name}.json")]
        small = ["--pairs", "10", "--prompts", "2", "--sampling-steps", "1", "--every", "1", "--seeds", "0"]
        main(["--data", "rendered", "--methods", "dpo", "--steps", str(steps), *files, *small])
        result: dict[str, object] = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        return result

    once = measured("once", 2)
    first = measured("twice", 1)["rendered, dpo, seed 0"]
    twice = measured("twice", 2)
    assert twice == once
    assert first == {"1": twice["rendered, dpo, seed 0"]["1"]}  # type: ignore[index]
    weights = [
        (
            tmp_path / name / "rendered-10-dpo-0" / "checkpoint-00000002" / "pytorch_lora_weights.safetensors"
        ).read_bytes()
        for name in ("once", "twice")
    ]
    assert weights[0] == weights[1]
    with pytest.raises(SystemExit, match=r"was measured with prompts = 2, not 3: give another --out"):
        main(["--prompts", "3", "--sampling-steps", "1", "--pairs", "10", "--out", str(tmp_path / "once.json")])
