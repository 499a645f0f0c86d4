"""Settings: recipes, round trips and errors that name file and key."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from diffusion_align.commands import options
from diffusion_align.training.methods import CONFIGS
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig
from diffusion_align.training.settings import load_config, load_recipe, recipe_path, save_config, validated

RECIPES = sorted(recipe_path("scenes_dpo").parents[1].rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    method = yaml.safe_load(path.read_text())["method"]
    assert load_config(CONFIGS[method], path).output_dir.startswith("runs/")


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    config = InPOConfig(beta=7.0, lora_target_modules=("to_q",), inversion_model="reference", max_pairs=5)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(InPOConfig, tmp_path / "config.yaml") == config


def test_saved_settings_record_versions(tmp_path: Path) -> None:
    save_config(DPOConfig(), tmp_path / "config.yaml")
    assert "torch" in yaml.safe_load((tmp_path / "config.yaml").read_text())["versions"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 3", "unknown key 'betta'; did you mean 'beta'"),
        ("loss_type: sigmiod", "loss_type = 'sigmiod' is wrong"),
        ("max_steps: 0", "max_steps = 0 is wrong: Input should be greater than 0"),
        ("learning_rate: fast", "learning_rate = 'fast' is wrong"),
        ("label_smoothing: 0.5", "label_smoothing = 0.5 is wrong"),
        ("method: inpo", "is a recipe for method 'inpo', not 'dpo'"),
        ("- 1", "expected 'key: value' lines, found list"),
        ("a: [", "not valid YAML"),
        ("cache_dir: c\nrandom_crop: true", "random_crop cannot be used with cache_dir"),
        ("min_timestep: 900\nmax_timestep: 900", "min_timestep = 900 must be smaller"),
    ],
)
def test_a_wrong_file_is_one_error_that_names_it(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(DPOConfig, path)
    assert "recipe.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such file"):
        load_config(DPOConfig, tmp_path / "nowhere.yaml")


def test_recipes_are_found_by_name_with_overrides() -> None:
    config = load_recipe("scenes_inpo", max_steps=7)
    assert isinstance(config, InPOConfig)
    assert config.max_steps == 7
    assert load_config(InPOConfig, "scenes_inpo").beta == config.beta
    with pytest.raises(ValueError, match="recipe scenes_inpo: unknown key 'max_step'; did you mean 'max_steps'"):
        load_recipe("scenes_inpo", max_step=7)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe .*scenes_dpo, .*scenes_inpo, "):
        recipe_path("scenes_ppo")


def test_values_of_python_configs_are_checked_too() -> None:
    with pytest.raises(ValueError, match="lora_rank = -1 is wrong"):
        validated(DPOConfig, {"lora_rank": -1}, "DPOConfig")


COMMAND_OPTIONS = [cls for _, cls in inspect.getmembers(options, is_dataclass)]


def helped(cls: type) -> dict[str, bool]:
    """Whether each field that the body of ``cls`` declares has a text under it, which tyro takes as its help."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
        for field, following in zip(node.body, [*node.body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


@pytest.mark.parametrize("cls", [*CONFIGS.values(), *COMMAND_OPTIONS], ids=lambda cls: cls.__name__)
def test_every_setting_has_help(cls: type) -> None:
    """A field without it would be a flag that nobody can understand."""
    known: dict[str, bool] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            known |= helped(base)  # type: ignore[arg-type]
    settings = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    assert len(settings) > 3
    assert [name for name in settings if not known[name]] == []
