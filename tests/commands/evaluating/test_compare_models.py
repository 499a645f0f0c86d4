"""``evaluate A B`` with models: pictures are generate's, killed runs go on, scales are matched."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.faults.kills import fork
from diffusion_align.cli import main
from diffusion_align.commands.console import Progress
from diffusion_align.commands.evaluating.comparison_options import EvaluateOptions
from diffusion_align.commands.evaluating.picture_jobs import seeded
from diffusion_align.commands.evaluating.side_opening import annotators, open_sides, trained_on
from diffusion_align.evaluation.arena import parse_sides
from diffusion_align.training.settings import load_recipe, save_config
from tests.adapters.loras.policies import trained
from tests.commands.evaluating.pictures import PROMPTS


@pytest.fixture(scope="module")
def lora(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: settings, a LoRA, and the pictures of a report."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    trained(sdxl_folder, 1).save(folder)
    save_config(replace(load_recipe("scenes_dpo"), model=str(sdxl_folder)), folder / "config.yaml")
    Image.new("RGB", (8, 8)).save(folder / "01-curves.png")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS[:2]))
    return file


def evaluated(out: Path, *arguments: str) -> dict[str, Any]:
    few = ["--seeds", "1", "--num-inference-steps", "2", "--batch-size", "1", "--device", "cpu"]
    assert main(["evaluate", *arguments, *few, "--out", str(out)]) == 0
    return settled(out)


def settled(out: Path) -> dict[str, Any]:
    """The table without what time changes."""
    table: dict[str, Any] = json.loads((out / "table.json").read_text())
    del table["times"]
    return table


def deadly_at(number: int) -> Callable[..., None]:
    """Progress that kills the process, as no handler can help it, at its call of this number."""
    calls = itertools.count(1)

    def call(*told: object) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return call


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_table_and_its_pictures_are_generate_s(
    lora: Path, prompts: Path, tmp_path: Path
) -> None:
    sides = ["base", f"{lora}@guidance_scale=3"]
    whole = evaluated(tmp_path / "whole", *sides, "--prompts", str(prompts))
    assert whole["sides"][0]["settings"]["model"] == whole["sides"][1]["settings"]["model"]  # the run's
    assert whole["cost"]["base"] == {"denoiser_calls": 4.0, "scorer_calls": 0.0}
    assert list(whole["sides"][1]["weights"])[1] == "pytorch_lora_weights.safetensors"

    died = tmp_path / "died"
    for deadly in (2, 5):  # while drawing, while scoring
        child = fork()
        if not child:
            try:
                Progress.__call__ = deadly_at(deadly)  # type: ignore[method-assign]
                evaluated(died, *sides, "--prompts", str(prompts), "--resume")
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    again = evaluated(died, *sides, "--prompts", str(prompts), "--resume")
    assert json.dumps(again) == json.dumps(whole)
    names = ["details.parquet", "report.html"]
    assert (died / names[0]).read_bytes() == (tmp_path / "whole" / names[0]).read_bytes()

    row = next(row for row in pq.read_table(died / "details.parquet").to_pylist() if row["side"] != "base")
    drawn = ["generate", row["prompt"], "--seed", str(row["seed"]), "--num-images", "1", "--num-inference-steps", "2"]
    model = ["--model", whole["sides"][0]["settings"]["model"], "--lora", str(lora), "--guidance-scale", "3"]
    assert main([*drawn, *model, "--batch-size", "1", "--device", "cpu", "--out", str(tmp_path / "drawn")]) == 0
    (picture,) = (tmp_path / "drawn").glob("*.png")
    assert np.array_equal(np.array(Image.open(picture)), np.array(Image.open(died / row["picture"])))


@pytest.mark.slow
def test_scales_are_matched_by_the_best_score_and_by_the_length_of_the_term(
    lora: Path, sdxl_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    other = tmp_path / "validation.txt"
    other.write_text(PROMPTS[3])
    flags = ["--prompts", str(prompts), "--validation-prompts", str(other), "--sweep", "1", "4"]
    best = evaluated(tmp_path / "scale", "base", str(lora), *flags, "--match", "scale")
    assert [verdict["label"] for verdict in best["verdicts"]] == ["matched", "unmatched"]
    assert set(best["curves"]) == {"base", "tuned"}
    for side, curve in best["curves"].items():
        chosen = max(curve, key=lambda scale: curve[scale])
        assert best["scales"][side].startswith(f"{chosen}, best of the sweep")
        assert best["scales"][f"{side} (as given)"] == "5, as given"

    model = ["--model", str(sdxl_folder)]
    same = evaluated(tmp_path / "same", "base", "same=base@guidance_scale=2.5", *model, *flags, "--match", "effective")
    matched, unmatched = same["verdicts"]
    assert (matched["label"], unmatched["label"]) == ("matched", "unmatched")
    scale = float(matched["baseline"].removeprefix("base at "))
    assert scale == pytest.approx(2.5, abs=0.3)  # two steps, a line between scales 1 and 4
    assert "as long as that of same" in same["scales"][matched["baseline"]]


def test_seeds_are_a_prompt_s_own_wherever_it_stands() -> None:
    one, two = seeded(["b", "a", "c"], 2, 0), seeded(["c", "b", "a", "a"], 2, 0)
    assert one == two
    assert len({seed for seeds in one.seeds for seed in seeds}) == 6
    assert seeded(["a"], 2, 5).seeds[0][0] == seeded(["a"], 1, 0).seeds[0][0] + 5
    assert [list(chunk) for chunk in one.chunks(3)] == [[0, 1], [2, 3], [4, 5]]


def test_what_a_side_was_trained_on_is_known(lora: Path, tmp_path: Path) -> None:
    labelled, annotated = tmp_path / "labelled", tmp_path / "annotated"
    for folder in (labelled, annotated):
        folder.mkdir()
    (labelled / "labels.json").write_text(json.dumps({"task": {"scorer": "pickscore"}}))
    (annotated / "rows.jsonl").write_text(json.dumps({"scorers": ["hps-v2.1", "looks=aesthetic"]}) + "\n")
    assert annotators(labelled) == ["pickscore"]
    assert annotators(annotated) == ["hps-v2.1", "aesthetic"]
    names = ["pickscore", "hps-v2.1", "aesthetic", "scenes-oracle", "scenes-vp"]
    (_, side) = open_sides(parse_sides(["base", str(lora)]), EvaluateOptions(sides=("base", str(lora))))
    assert side.run is not None
    assert trained_on(side, names) == {}  # the recipe's oracle only watched
    for change, expected in (
        ({"dataset": str(labelled)}, {"pickscore"}),
        ({"dataset": str(annotated)}, {"hps-v2.1", "aesthetic"}),
        ({"early_stopping_patience": 1, "validation_scorer": "scenes-oracle"}, {"scenes-oracle"}),
        ({"relabel_with": "scenes-vp"}, {"scenes-vp"}),
    ):
        assert set(trained_on(replace(side, run=replace(side.run, **change)), names)) == expected
    online = replace(side, run=replace(load_recipe("scenes_grpo"), scorers=("scenes-vp",)))
    assert trained_on(online, names) == {"scenes-vp": "scorers of its config"}


def test_a_run_s_model_and_settings_become_generate_s(lora: Path, sdxl_folder: Path) -> None:
    texts = [
        "base",
        f"x={lora}@guidance=dynamic,candidates=2+3.5,num_inference_steps=7,negative_prompt=none",
        "scenes-sd",
    ]
    base, tuned, other = open_sides(parse_sides(texts), EvaluateOptions(sides=tuple(texts), guidance_scale=4.0))
    assert base.drawing is not None
    assert tuned.drawing is not None
    assert other.drawing is not None
    assert (base.drawing.model, base.drawing.lora, base.drawing.guidance_scale) == (str(sdxl_folder), (), 4.0)
    assert (tuned.drawing.lora, tuned.drawing.candidates) == ((str(lora),), (2.0, 3.5))
    assert (tuned.drawing.num_inference_steps, tuned.drawing.negative_prompt) == (7, None)
    assert other.drawing.model == "scenes-sd"
