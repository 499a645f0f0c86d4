"""Every command and every method that loads a diffusion model takes the same options, and hands all of them on."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_align import load_adapter
from diffusion_align.adapters import Adapter
from diffusion_align.cli import COMMANDS, main, parse
from diffusion_align.commands.annotate import read_finished
from diffusion_align.commands.options import AnnotateOptions
from diffusion_align.training.methods import METHODS, config_class
from diffusion_align.training.online.config import GRPOConfig
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.policy.model_options import ModelOptions
from diffusion_align.training.settings import load_config, save_config
from tests.original_layout import write_single_file

ROOT = Path(__file__).resolve().parents[2]

#: Values other than the defaults.
GIVEN: dict[str, Any] = {
    "model": "folder", "variant": "fp16", "revision": "main", "vae": "vae", "model_config": "configs", "family": "sd",
    "prediction_type": "v_prediction", "dtype": "bf16", "vae_batch_size": 3, "vae_tiling": True,
    "max_sequence_length": 77,
}  # fmt: skip
FLAGS = [
    word
    for name, value in GIVEN.items()
    for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
]
#: What each command and method needs besides; those that load no diffusion model are not among them.
LINES = {
    "generate": ["a prompt"],
    "annotate": ["prompts.txt", "--scorers", "scenes-oracle"],
    "evaluate guidance": [],
    "cache": ["--cache-dir", "c"],
    "export": ["run", "--format", "kohya"],
    **{f"train {method}": [] for method in METHODS if config_class(method).takes_model},
    "train evaluator": ["--kinds", "preference"],
}
#: Commands without such a model: the demo's is fixed, scores are of pictures, a sweep's runs have their own settings.
WITHOUT = {
    "demo", "score", "scorers", "serve-scorer", "data", "sweep", "train reward", "studio", "card", "push", "recipes",
    "init", "doctor", "completion",
}  # fmt: skip


def test_no_command_is_forgotten() -> None:
    words = {name for name in COMMANDS if name not in ("train", "evaluate")}
    words |= {"evaluate guidance", *(f"train {method}" for method in METHODS)}
    assert set(LINES) | WITHOUT == words


def test_the_options_are_those_of_the_class() -> None:
    assert {field.name for field in fields(ModelOptions)} == set(GIVEN)


@pytest.mark.parametrize("command", LINES)
def test_every_command_takes_every_option(command: str) -> None:
    options = parse([*command.split(), *LINES[command], *FLAGS])[1]
    assert isinstance(options, ModelOptions)
    assert {name: getattr(options, name) for name in GIVEN} == GIVEN


@pytest.mark.parametrize("method", [method for method in METHODS if config_class(method).takes_model])
def test_every_recipe_takes_every_option(method: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(GIVEN))
    config = load_config(config_class(method), tmp_path / "recipe.yaml", complete=False)
    assert {name: getattr(config, name) for name in GIVEN} == GIVEN


@pytest.mark.slow
def test_models_are_loaded_at_one_door() -> None:
    """Outside of it only the embedded world's own makers call ``load_adapter``: they take shipped models."""
    callers = set()
    for top in ("diffusion_align", "training", "rewards"):
        for path in (ROOT / top).rglob("*.py"):
            calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
            if any(isinstance(called, ast.Name) and called.id == "load_adapter" for called in calls):
                callers.add(str(path.relative_to(ROOT)))
    makers = {path for path in callers if path.startswith("diffusion_align/scenes/make/")}
    assert callers - makers == {"training/policy/model.py", "diffusion_align/commands/demo.py"}


@pytest.mark.parametrize("command", LINES)
def test_every_command_hands_all_options_on(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each of them gives to ``load_adapter``, whose own work is stopped there."""
    seen: list[dict[str, Any]] = []

    def stopped(model: str, **options: Any) -> Adapter:
        seen.append({"model": model, **options})
        raise ValueError("far enough")

    monkeypatch.setattr("diffusion_align.training.policy.model.load_adapter", stopped)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red star\n")
    (tmp_path / "run").mkdir()  # to be exported
    more = [] if command.split()[0] not in ("train", "cache") else ["--report-to", "none", "--output-dir", "run"]
    assert main([*command.split(), *LINES[command], *FLAGS, *more]) == 2
    (given,) = seen
    names = {"model_config": "config"}
    expected = {names.get(name, name): value for name, value in GIVEN.items() if name != "dtype"}
    assert {name: given[name] for name in expected} == expected
    # An export folds the LoRA into float32 weights, and rounds them then.
    assert str(given["dtype"]) == ("torch.float32" if command == "export" else "torch.bfloat16")


# -- precision ---------------------------------------------------------------------------------------------------------


def test_dtype_is_weight_dtype_in_runs(tmp_path: Path) -> None:
    assert DPOConfig(dtype="bf16").weight_dtype == "bf16"
    assert DPOConfig(weight_dtype="fp16").weight_dtype == "fp16"
    assert GRPOConfig().weight_dtype == "fp32"
    assert DPOConfig(dtype="bf16").reference_settings()["weight_dtype"] == "bf16"


def test_what_a_run_saves_can_still_be_overridden(tmp_path: Path) -> None:
    save_config(DPOConfig(dtype="bf16"), tmp_path / "config.yaml")
    assert load_config(DPOConfig, tmp_path / "config.yaml").weight_dtype == "bf16"
    again = parse(["train", "dpo", "--config", str(tmp_path / "config.yaml"), "--weight-dtype", "fp16"])[1]
    assert again.weight_dtype == "fp16"


# -- from the command line's door --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_takes_a_single_file_of_sd(sd_folder: Path, tmp_path: Path) -> None:
    file = write_single_file(tmp_path / "model.safetensors", load_adapter(sd_folder).pipeline)
    basic = ["--num-inference-steps", "2", "--num-images", "1"]
    flags = ["--model", str(file), "--model-config", str(sd_folder), "--out", str(tmp_path / "a")]
    assert main(["generate", "a red star", *basic, *flags]) == 0
    assert main(["generate", "a red star", *basic, "--model", str(sd_folder), "--out", str(tmp_path / "b")]) == 0
    first, second = (next((tmp_path / name).glob("*.png")) for name in "ab")
    assert load_pixels(first) == load_pixels(second)


def load_pixels(path: Path) -> bytes:
    from PIL import Image

    return Image.open(path).tobytes()


def test_annotations_with_other_weights_are_not_mixed(tmp_path: Path) -> None:
    """Folders from before these options, which say nothing of them, are continued."""
    options = {"prompts": "p", "scorers": ("a",), "out": str(tmp_path)}
    assert read_finished(tmp_path / "rows.jsonl", [], AnnotateOptions(**options)) == []  # type: ignore[arg-type]
    assert "vae" not in (tmp_path / "rows.jsonl").read_text()
    with pytest.raises(ValueError, match="belongs to a run with other options"):
        read_finished(tmp_path / "rows.jsonl", [], AnnotateOptions(**options, vae="other"))  # type: ignore[arg-type]
