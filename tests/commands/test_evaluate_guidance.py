"""``evaluate guidance`` and what ``generate`` does with what it learned, from flags to files."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from diffusion_align.cli import parse
from diffusion_align.commands.evaluate_guidance import evaluate_guidance
from diffusion_align.commands.generate import generate_files
from diffusion_align.commands.guiding.guidance_options import EvaluateGuidanceOptions
from diffusion_align.commands.options import GenerateOptions
from tests.adapters.loras.policies import trained

PROMPTS = ["a large red star on a dark background", "two small blue rings on a dark background"]


@pytest.mark.slow
def test_a_table_with_what_is_learned_and_pictures_drawn_with_it(sdxl_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("positive", 1), ("negative", 2)):
        trained(sdxl_folder, seed).save(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    lora, negative, schedule = (str(tmp_path / name) for name in ("positive", "negative", "schedule.json"))
    prompts = str(tmp_path / "prompts.txt")
    options = EvaluateGuidanceOptions(
        model=str(sdxl_folder), lora=(lora,), prompts=prompts, validation_prompts=prompts, num_inference_steps=2,
        seeds=(0,), ways=("curve",), sweep=(2.0, 4.0), candidates=(1.0, 4.0), matched_prompts=1, fit=schedule,
        fit_rollouts=2, negative_lora=(negative,), merge_weights=(0.5,), out=str(tmp_path / "out"), device="cpu",
    )  # fmt: skip
    options.check()
    page = evaluate_guidance(options).read_text()
    with pytest.raises(FileExistsError, match=r"table\.json .*is already there: .*--overwrite"):
        evaluate_guidance(options)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    names = set(table["rows"])
    assert {"static 2", "static 4", "annealing"} <= names
    assert any(name.startswith("contrastive ") for name in names)
    assert any(name.startswith("merged 0.5, static ") for name in names)
    assert set(table["chosen_on_validation"]) == {"contrastive", "merged", "annealing"}
    assert table["curve"]["scales"] == [2.0, 4.0]
    for name in names:
        assert name in page
    drawn = [name for name in names if not name.startswith("bound")]
    for name, prompt in product(drawn, PROMPTS):
        assert page.count(f'alt="{prompt}, {name}">') == 1  # every way's picture of each prompt
    assert '<div class="cell best">' in page
    for more in (
        {"guidance": "annealing", "schedule": schedule, "lora": (lora,)},
        {"guidance": "contrastive", "negative_lora": (negative,), "lora": (lora,), "guidance_stop": 0.5},
        {"negative_lora": (negative,), "negative_merge": 0.5, "lora": (lora,)},
    ):
        settings: dict[str, Any] = {"num_images": 1, "num_inference_steps": 2, "device": "cpu", **more}
        settings |= {"out": str(tmp_path / "pictures"), "overwrite": True}
        drawn = generate_files(GenerateOptions(model=str(sdxl_folder), prompt=PROMPTS[0], **settings))
        record = json.loads(drawn[0].with_suffix(".json").read_text())
        assert record["nfe"] == (3 if "guidance_stop" in more else 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("generate x --guidance contrastive", "needs --negative-lora"),
        ("generate x --negative-lora a", "goes with either"),
        ("generate x --negative-lora a --guidance contrastive --negative-merge 1", "goes with either"),
        ("generate x --negative-merge 1", "needs --negative-lora"),
        ("generate x --negative-keep 0.5", "goes with --guidance contrastive"),
        ("generate x --guidance annealing", "needs --schedule"),
        ("generate x --guidance-stop 2", "a share of the steps"),
        ("generate x --guidance replay --schedule r.json --guidance-stop 0.5", "does not go with --guidance replay"),
        ("evaluate guidance --matched-prompts -1", "expected at least 0"),
        ("evaluate guidance --stops 1.5", "shares between 0 and 1"),
        ("evaluate guidance --fit a --annealing b", "give one of them"),
        ("evaluate guidance --fit a --candidates 2", "--candidates that differ"),
    ],
)
def test_flags_that_do_not_fit_each_other_are_named(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(flags.split())


def test_a_schedule_that_is_none_is_named_before_anything_is_drawn(sdxl_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(sdxl_folder), "annealing": str(tmp_path / "none.json"), "device": "cpu"}
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        evaluate_guidance(EvaluateGuidanceOptions(**options))
