"""What a new user meets in the first hour: nothing lost, nothing guessed, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from pkgutil import iter_modules

import numpy as np
import pytest
import torch
from PIL import Image
from setuptools.command.egg_info import FileList

import diffusion_align
from diffusion_align import DPOConfig, generate, load_adapter, load_evaluator, load_scorer, shipped_path
from diffusion_align.cli import main
from diffusion_align.commands import demo
from diffusion_align.commands.opening import evaluator_for
from diffusion_align.data.tables import open_source
from diffusion_align.shipped import EVALUATOR_OF, SHIPPED_EVALUATORS, SHIPPED_MODELS
from diffusion_align.training.engine.accelerator import check_tracker, prepare_folder
from diffusion_align.training.engine.checkpoint import CheckpointError
from diffusion_align.training.engine.reporting.last_words import last_words, validated_line
from diffusion_align.training.scorers.building import scorer_kind
from diffusion_align.training.settings import validated

ROOT = Path(__file__).parent.parent.parent


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a command that must fail with status 2."""
    assert main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_pictures_are_not_written_over_unless_that_is_asked_for(
    sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", "a fox", "--model", str(sdxl_folder), "--out", str(tmp_path), "--num-inference-steps", "1"]
    assert main([*line, "--num-images", "1"]) == 0
    (first,) = tmp_path.glob("*.png")
    before = first.read_bytes()
    assert f"{first} is already there: give another --out, or --overwrite" in fails(capsys, *line)
    assert first.read_bytes() == before
    assert main([*line, "--num-images", "1", "--guidance-scale", "1", "--overwrite"]) == 0
    assert first.read_bytes() != before


def test_a_table_of_scores_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scores.jsonl").write_text("precious")
    line = ["score", str(tmp_path), "--scorers", "brisque", "--out", str(tmp_path / "scores.jsonl")]
    assert "scores.jsonl is already there" in fails(capsys, *line)
    assert (tmp_path / "scores.jsonl").read_text() == "precious"


def test_a_run_is_not_written_over_even_if_its_checkpoints_are_gone(tmp_path: Path) -> None:
    prepare_folder(DPOConfig(report_to="none"), tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}")  # of a run that died before it had anything to lose
    prepare_folder(DPOConfig(report_to="none"), tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=r"holds pytorch_lora_weights.safetensors .* pass --overwrite-output"):
        prepare_folder(DPOConfig(report_to="none"), tmp_path)
    prepare_folder(DPOConfig(report_to="none", overwrite_output_dir=True), tmp_path)
    prepare_folder(DPOConfig(report_to="none", resume_from_checkpoint="latest"), tmp_path)


def test_a_folder_that_is_taken_and_a_checkpoint_that_is_not_there_are_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "dpo", "--output-dir", str(tmp_path), "--report-to", "none"]
    assert f"{tmp_path}: no whole checkpoint" in fails(capsys, *line, "--resume-from-checkpoint", str(tmp_path))
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"precious")
    assert f"{tmp_path} holds pytorch_lora_weights.safetensors of an earlier run" in fails(capsys, *line)
    (tmp_path / "checkpoint-00000001").mkdir()
    torn = fails(capsys, *line, "--resume-from-checkpoint", str(tmp_path / "checkpoint-00000001"))
    assert "manifest.json is missing: this is no whole checkpoint" in torn


def test_a_demo_is_made_anew_and_leaves_everything_else_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []

    def stop(count: int) -> None:
        begun.append(tmp_path)
        raise RuntimeError("the demo began")

    monkeypatch.setattr(demo, "held_out_prompts", stop)
    line = ["demo", "--out", str(tmp_path / "demo")]
    assert main(line) == main(line) == 1  # its own folder, twice
    assert "demo with" in fails(capsys, *line, "--seed", "1")
    assert main([*line, "--seed", "1", "--overwrite"]) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("precious")
    said = fails(capsys, "demo", "--out", str(tmp_path / "mine"))
    assert "holds report.html and no demo.json: give another --out, or --overwrite" in said
    assert len(begun) == 3


def test_dynamic_guidance_takes_the_evaluator_of_its_model() -> None:
    assert evaluator_for("scenes-sd", None) == "scenes-sd-evaluator"
    assert evaluator_for("scenes-sd", "mine") == "mine"
    assert set(EVALUATOR_OF.values()) == set(SHIPPED_EVALUATORS)
    with pytest.raises(ValueError, match="needs --evaluator: none comes with models/own"):
        evaluator_for("models/own", None)


@pytest.mark.slow
def test_a_prompt_need_not_be_in_a_list(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    steps = {"num_inference_steps": 1}
    one = generate(adapter, "a fox", seeds=[3], **steps)
    assert torch.equal(one, generate(adapter, ["a fox"], seeds=[3], **steps))
    second = generate(adapter, "a fox", seeds=[1], **steps)
    torch.testing.assert_close(generate(adapter, "a fox", seeds=[0, 1], **steps)[1:], second)
    assert torch.equal(generate(adapter, ["a fox"], **steps), generate(adapter, "a fox", seeds=[0], **steps))


def test_a_tracker_that_is_not_installed_is_refused() -> None:
    check_tracker("none")
    with pytest.raises(ImportError, match=r"report_to no_such needs the no_such package: pip install"):
        check_tracker("no_such")


def test_folders_of_runs_are_taken_for_scorers_and_evaluators(tmp_path: Path) -> None:
    (tmp_path / "scorer").symlink_to(shipped_path("scenes-vp"))
    (tmp_path / "evaluator").symlink_to(shipped_path("scenes-sd-evaluator"))
    assert load_scorer(tmp_path).name == load_scorer(shipped_path("scenes-vp")).name
    assert scorer_kind(str(tmp_path)) == "vp-score"
    assert load_evaluator(tmp_path).settings == load_evaluator("scenes-sd-evaluator").settings


def test_settings_of_other_programs_are_met_with_our_names() -> None:
    with pytest.raises(TypeError, match="'lr' is no setting of DPOConfig: did you mean 'learning_rate'"):
        DPOConfig(lr=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'bta' is no setting of DPOConfig: did you mean 'beta'"):
        DPOConfig(bta=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"recipe.yaml: unknown key 'lr'; did you mean 'learning_rate'"):
        validated(DPOConfig, {"lr": 1}, "recipe.yaml")


def test_the_package_has_no_rooms_that_are_not_its_own() -> None:
    names = {module.name for module in iter_modules(diffusion_align.__path__)}
    assert names.isdisjoint({"tests", "benchmarks", "notebooks"})
    assert {"adapters", "commands", "scenes"} <= names


@pytest.mark.slow
def test_python_m_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "diffusion_align"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: diffusion-align COMMAND")


def test_the_source_archive_has_docs_tests_and_changelog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = FileList()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        files.process_template_line(line)
    assert {"docs/dpo.md", "docs/evidence/pairs.md", "CHANGELOG.md", "tests/conftest.py"} <= set(files.files)
    assert not [name for name in files.files if name.endswith(".pyc")]


def test_notebooks_get_widgets_for_their_progress_bars() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(name.startswith("ipywidgets") for name in extras["notebooks"])


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_shipped_pipelines_have_one_dtype_in_plain_diffusers(name: str) -> None:
    configs = (shipped_path(name)).glob("text_encoder*/config.json")
    assert {json.loads(path.read_text())["dtype"] for path in configs} == {
        "float32"
    }  # what diffusers makes of the rest


@pytest.mark.slow
def test_what_libraries_say_of_themselves_stays_off_the_console(
    sdxl_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", "a red star " * 40, "--model", str(sdxl_folder), "--out", str(tmp_path), "--num-images", "2"]
    assert main([*line, "--num-inference-steps", "1", "--batch-size", "1"]) == 0
    said = [text for text in capfd.readouterr().err.splitlines() if text.strip()]
    assert len(said) == 1
    assert said[0].startswith("note: 1 of 1 prompts are longer than the text encoder reads")


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs of noise with captions that the scenes world does not know; no validation split."""
    folder = tmp_path_factory.mktemp("own")
    rows = []
    for number in range(4):
        for side in ("chosen", "rejected"):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}-{side}.png")
        rows.append(f"{number}-chosen.png,{number}-rejected.png,a fox in the snow\n")
    (folder / "train.csv").write_text("chosen,rejected,caption\n" + "".join(rows))
    return folder


@pytest.mark.slow
def test_own_pictures_are_validated_by_a_scorer_that_knows_them(
    own_pictures: Path, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_source(own_pictures, "train", streaming=False).columns == ("chosen", "rejected", "caption")
    line = ["train", "dpo", "--config", "scenes_dpo", "--dataset", str(own_pictures), "--model", str(sdxl_folder)]
    line += ["--eval-steps", "1", "--output-dir", str(tmp_path / "run"), "--per-device-train-batch-size", "2"]
    said = fails(capsys, *line)
    assert "give --validation-prompts, a file with one prompt a line" in said
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox in the snow\n")
    said = fails(capsys, *line, "--validation-prompts", str(prompts))
    assert "validation_scorer scenes-oracle cannot judge the validation prompts" in said
    assert "--validation-scorer, e.g. clip" in said


@pytest.mark.slow
def test_a_run_without_validation_ends_with_pictures_figures_and_what_to_do_next(
    own_pictures: Path, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    line = ["train", "dpo", "--dataset", str(own_pictures), "--model", str(sdxl_folder), "--output-dir", str(out)]
    line += ["--max-steps", "1", "--report-to", "none", "--no-progress", "--final-pictures", "2"]
    line += ["--validation-inference-steps", "2", "--cache-dir", str(cache)]  # a run from a cache has no VAE
    assert main(line) == 0
    said = capsys.readouterr().out
    (picture,) = (out / "samples").glob("*.png")
    assert str(picture) in said
    assert f"report    {out / 'report.html'}" in said
    assert "accuracy  " in said
    assert f"diffusion-align generate 'a prompt of yours' --model {sdxl_folder} --lora {out}" in said
    assert "Base and trained model, same prompts and seeds" in (out / "report.html").read_text()


def test_the_last_words_tell_accuracy_win_rate_and_what_is_wrong(tmp_path: Path) -> None:
    config = DPOConfig(output_dir=str(tmp_path / "a run"))
    lines = [
        {"step": step, "implicit_accuracy": 0.5 + step / 100, "chosen_error_up": 0.9 + step / 100} for step in range(10)
    ]
    win = {"eval/win_rate": 0.61, "eval/win_rate_low": 0.5, "eval/win_rate_high": 0.71, "eval/reward": 0.3}
    said = "\n".join(last_words(config, [*lines, {"step": 10, **win, "eval/base_reward": 0.25}]))
    assert "accuracy  57.0% of the last pairs" in said
    assert "win rate  61.0% [50.0%, 71.0%] over the base" in said
    assert "chosen_error_up is 0.97" in said
    assert f"generate 'a prompt of yours' --model scenes-sdxl --lora '{tmp_path / 'a run'}'" in said
    assert "note" not in "\n".join(last_words(config, lines[:1]))
    assert validated_line(10, win) == "validation at step 10: win rate 61.0% [50.0%, 71.0%], reward 0.3"
