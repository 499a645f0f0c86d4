"""doctor, init, completion and recipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from diffusion_align.cli import COMMANDS, main, parse
from diffusion_align.commands.helping import doctor
from diffusion_align.commands.helping.command_tree import command_tree
from diffusion_align.commands.helping.health import QUESTIONS, Finding, answered, pasteable
from diffusion_align.commands.helping.new_recipe import GIB, fitted, help_texts
from diffusion_align.commands.helping.shell_scripts import bash, fish, following, zsh
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.settings import known_recipes, load_config


@pytest.fixture(scope="module")
def tree() -> dict[str, list[object]]:
    return command_tree()  # type: ignore[return-value]


def test_every_command_is_in_the_tree_and_its_flags_are_those_that_the_parser_knows(tree: dict[str, list]) -> None:
    assert set(following(tree)[""]) == set(COMMANDS)
    for words, flags in tree.items():
        if words in ("train dpo", "generate", "data import", "recipes list", "cache gc"):
            names = {flag.name for flag in flags}
            assert len(names) == len(flags)
            assert names & {"--model", "--folder", "--source", "--quick"} or words == "recipes list"


def complete(script: Path, line: str) -> set[str]:
    """What bash proposes for a line, the last word of which is being written."""
    words = line.split(" ")
    ask = (
        f"source {script}; COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; "
        '_diffusion_align; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, cwd=script.parent)
    assert not done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_flags_and_values(tree: dict[str, list], tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(bash(tree))
    assert {"train", "generate", "doctor"} <= complete(script, "diffusion-align ")
    assert complete(script, "diffusion-align tr") == {"train"}
    assert {"dpo", "inpo"} <= complete(script, "diffusion-align train ")
    assert complete(script, "diffusion-align train dpo --learning-r") == {"--learning-rate"}
    assert complete(script, "diffusion-align generate --sched") == {"--scheduler", "--schedule"}
    assert complete(script, "diffusion-align generate --scheduler eu") == {"euler", "euler-a"}
    assert complete(script, "diffusion-align train dpo --config scenes_d") >= {"scenes_dpo", "scenes_draft"}
    assert complete(script, "diffusion-align data imp") == {"import"}
    assert complete(script, "diffusion-align data import --form") == {"--format"}


def test_scripts_of_other_shells_name_the_same(tree: dict[str, list], capsys: pytest.CaptureFixture[str]) -> None:
    assert "bashcompinit" in zsh(tree)
    lines = fish(tree).splitlines()
    assert any("__fish_seen_subcommand_from train; and __fish_seen_subcommand_from dpo' -l beta -r" in t for t in lines)
    assert any("-l scheduler -r -a 'default ddim" in line for line in lines)
    for shell, program in (("fish", "fish"), ("zsh", "zsh")):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        if shutil.which(program):
            subprocess.run([program, "-n"], input=script, text=True, check=True)


def test_recipes_are_listed_shown_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == known_recipes().keys()
    assert found["scenes_dpo"]["method"] == "dpo"
    assert main(["recipes", "show", "scenes_dpo"]) == 0
    assert capsys.readouterr().out == known_recipes()["scenes_dpo"].read_text()
    assert main(["recipes", "copy", "scenes_dpo"]) == 0
    assert (tmp_path / "scenes_dpo.yaml").read_bytes() == known_recipes()["scenes_dpo"].read_bytes()
    assert main(["recipes", "copy", "scenes_dpo"]) == 2
    assert "scenes_dpo.yaml is already there" in capsys.readouterr().err
    assert main(["recipes", "show", "scenes_dpoo"]) == 2
    assert "no recipe 'scenes_dpoo' (did you mean 'scenes_dpo'?)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_new_recipe_is_one_that_runs_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "dpo", "--model", "scenes-sd", "--dataset", "scenes-pairs", "--vram", "1"]) == 0
    said = capsys.readouterr()
    assert "total, per device" in said.out  # the plan
    assert "of 1 GiB" in said.err
    recipe = (tmp_path / "dpo.yaml").read_text()
    config = load_config(DPOConfig, "dpo.yaml")
    assert (config.model, config.dataset, config.output_dir) == ("scenes-sd", "scenes-pairs", "runs/dpo")
    assert "# Strength of the pull to the reference" in recipe
    assert "# beta: 5000.0" in recipe
    written = (tmp_path / "dpo.yaml").read_bytes()
    assert main(["init", "dpo", "--model", "scenes-sdxl"]) == 2
    assert (tmp_path / "dpo.yaml").read_bytes() == written
    assert main(["init", "dpoo"]) == 2
    assert "did you mean 'dpo'" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_saved_until_the_run_fits_and_no_further() -> None:
    config = DPOConfig(model="scenes-sd", per_device_train_batch_size=4)
    needed = config.memory_bytes()
    assert needed is not None
    assert fitted(config, 2 * needed / GIB)[0] == config
    smaller, notes = fitted(config, 0.9 * needed / GIB)
    found = smaller.memory_bytes()
    assert found is not None
    assert found <= 0.9 * needed
    assert smaller.per_device_train_batch_size * smaller.gradient_accumulation_steps == 4
    assert notes[0].startswith("about ")
    near = replace(config, gradient_checkpointing="full", per_device_train_batch_size=1, lora_rank=2, vae_batch_size=1)
    smallest, notes = fitted(near, 0.001)
    assert (smallest.weight_dtype, smallest.lora_rank, smallest.optim) == ("bf16", 1, "adamw_8bit")
    assert "no setting is left" in notes[0]


def test_help_texts_are_those_of_the_class_itself() -> None:
    assert help_texts(DPOConfig)["beta"].startswith("Strength of the pull to the reference")
    assert yaml.safe_load("method: dpo")["method"] == DPOConfig.method


def test_a_question_that_fails_is_an_answer() -> None:
    def about_trouble() -> Iterator[Finding]:
        raise RuntimeError("no such thing")
        yield

    (found,) = answered((about_trouble,))
    assert found == replace(found, name="trouble", state="fail", text="RuntimeError: no such thing")


def test_what_is_pasted_has_no_home_user_or_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USER", "ada")
    said = pasteable("token hf_abcdefghijklmnop in /home/ada/x, /data/ada/y and ada")
    assert said == "token (secret) in ~/x, /data/USER/y and ada"


@pytest.mark.slow
def test_the_doctor_finds_this_machine_fit_for_the_embedded_world(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["doctor", "--quick"])[1].quick
    assert len(QUESTIONS) == 7
    begun = time.process_time()
    assert main(["doctor", "--json"]) == 0
    assert time.process_time() - begun < 20
    found = json.loads(capsys.readouterr().out)
    states = {finding["name"]: finding["state"] for finding in found["findings"]}
    assert {"versions", "cpu", "hub cache", "fsync", "hub", "training"} <= states.keys()
    assert states["training"] == "ok"


@pytest.mark.slow
def test_the_quick_doctor_takes_a_few_seconds_and_trains_nothing() -> None:
    before = os.times()  # processor time, which is up to twice that of a machine with nothing else to do
    command = [sys.executable, "-m", "diffusion_align", "doctor", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    assert "training" not in {finding["name"] for finding in json.loads(done.stdout)["findings"]}
    assert after.children_user + after.children_system - before.children_user - before.children_system < 5


def test_a_doctor_that_finds_something_broken_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def about_trouble() -> Iterator[Finding]:
        yield Finding("xformers", "fail", "installed, but cannot be imported", "reinstall it")

    monkeypatch.setattr(doctor, "QUESTIONS", (about_trouble, about_trouble))
    assert main(["doctor", "--quick"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["fail", "xformers", "installed,", "but", "cannot", "be", "imported"]
    assert "-> reinstall it" in said[1]
    assert said[-1] == "0 ok, 0 warn, 1 fail"


LIGHT = ("doctor", "init", "completion", "recipes list", "data import", "data check")

#: What the help of one command after another imports.
HELPS = """
import sys
from contextlib import suppress
from diffusion_align.cli import main
for words in sys.argv[1:]:
    with suppress(SystemExit):
        main([*words.split(), "--help"])
    heavy = [name for name in ("torch", "starlette", "datasets", "pyarrow", "diffusers") if name in sys.modules]
    print(words, heavy, file=sys.stderr)
"""


@pytest.mark.slow
def test_help_of_light_commands_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELPS, *LIGHT], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"{words} []" for words in LIGHT]
