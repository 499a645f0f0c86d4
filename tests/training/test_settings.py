"""Settings: recipes, round trips and errors that name file and key."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_align.cli import parse
from diffusion_align.commands import options
from diffusion_align.training.methods import METHODS, config_class
from diffusion_align.training.online.config import RolloutConfig
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig
from diffusion_align.training.settings import load_config, load_recipe, recipe_path, save_config, to_dict, validated

RECIPES = sorted(recipe_path("scenes_dpo").parents[1].rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    method = yaml.safe_load(path.read_text())["method"]
    assert load_config(config_class(method), path).output_dir.startswith("runs/")


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


COMMAND_OPTIONS = [cls for _, cls in inspect.getmembers(options, is_dataclass) if cls.__module__ == options.__name__]


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


@pytest.mark.parametrize("cls", [*map(config_class, METHODS), *COMMAND_OPTIONS], ids=lambda cls: cls.__name__)
def test_every_setting_has_help(cls: type) -> None:
    """A field without it would be a flag that nobody can understand."""
    known: dict[str, bool] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            known |= helped(base)  # type: ignore[arg-type]
    settings = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    assert settings or cls is options.ScorersOptions  # that one has the flags of every command alone
    assert [name for name in settings if not known[name]] == []


#: Defaults of 0.1 with which these learned nothing (a batch of one, a rate of 1e-5), and which are others now.
LEARNING = ("per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps")
RENEWED = {"reward": LEARNING, "evaluator": LEARNING}
KNOWN = yaml.safe_load((Path(__file__).parent / "settings_of_0_1.yaml").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_earlier_recipes_is_still_there_with_its_default(method: str) -> None:
    policies = {} if method in ("reward", "evaluator") else KNOWN["policies"]
    known = KNOWN["every"] | policies | KNOWN.get(method, {})  # methods of later versions have none of their own
    known = {name: value for name, value in known.items() if name not in RENEWED.get(method, ())}
    found = to_dict(config_class(method)())
    assert {name: found.get(name, "missing") for name in known} == known


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_called_as_in_the_table(method: str) -> None:
    assert config_class(method).method == method


def test_the_command_line_may_complete_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("reference_cache: true\nnoise_draws: 4\n")
    with pytest.raises(ValueError, match=r"command line and .*recipe\.yaml: reference_cache needs cache_dir"):
        parse(["train", "dpo", "--config", str(path)])
    config = parse(["train", "dpo", "--config", str(path), "--cache-dir", "cache"])[1]
    assert (config.noise_draws, config.cache_dir) == (4, "cache")


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("dpo", {"full_finetuning": True, "weight_dtype": "fp16"}, "weight_dtype fp16 with full_finetuning needs"),
        ("dpo", {"noise_draws": 2, "streaming": True}, "noise_draws needs pairs with random access"),
        ("dpo", {"reference_cache": True}, "reference_cache needs noise_draws"),
        ("inpo", {"reference_cache": True, "noise_draws": 2, "cache_dir": "c"}, "cannot be used with inversion_model"),
        ("grpo", {"per_device_train_batch_size": 3}, "128 training items, an optimiser step takes 3"),
        ("grpo", {"min_timestep": 1000}, "min_timestep = 1000: expected less than 1000"),
        ("grpo", {"trust": "prefpaint", "scorers": ["a", "b"]}, "trust prefpaint needs one scorer"),
        ("grpo", {"fused_rollouts": True}, "must be its 128 training items, not 1"),
        ("nft", {"num_generations": 1}, "num_generations = 1"),
        ("raft", {"keep": 9}, "keep = 9: only 8"),
        ("draft", {"gradient_steps": 21}, "gradient_steps = 21: there are 20"),
        ("draft", {"lv_repeats": 2, "random_last_step": True}, "lv_repeats re-noises the last step"),
        ("evaluator", {"kinds": ["fidelity"]}, "give real_dataset"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_told_before_anything_is_loaded(
    method: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        validated(config_class(method), values, "here")


@pytest.mark.parametrize(
    ("method", "values", "items"),
    [
        ("grpo", {"train_steps": 3}, 4 * 8 * 3),
        ("nft", {"updates_per_picture": 5}, 4 * 8 * 5),
        ("raft", {"keep": 2, "updates_per_picture": 5}, 4 * 2 * 5),
    ],
)
def test_a_rollout_has_items_for_every_kept_picture(method: str, values: dict[str, Any], items: int) -> None:
    config = config_class(method)(**values)
    assert isinstance(config, RolloutConfig)
    assert config.items_per_rollout() == items


def test_the_settings_of_every_method_are_still_a_public_name() -> None:
    from diffusion_align.training import CONFIGS

    assert {name: config.method for name, config in CONFIGS.items()} == {name: name for name in METHODS}
