"""The list of scorers, and the check of one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusion_align.cli import main
from diffusion_align.commands.parsing import scorer_options
from diffusion_align.commands.scorers import references, verify
from diffusion_align.commands.scorers.cards import scene_cards
from diffusion_align.rewards import load_scorer
from diffusion_align.scenes.world.oracle import score_image
from tests.reward_checkpoints import clip_folder, clip_weights
from tests.rewards.vision_language_models import Llava


@pytest.mark.slow
def test_the_list_is_quick_and_names_size_licence_needs_and_place() -> None:
    code = "import sys; from diffusion_align.cli import main; main(['scorers']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "17.6 GB  Apache-2.0" in lines["hps-v3++"]
    assert "source_images, masks" in lines["prefpaint"]
    assert lines["scenes-vp"].endswith("in the package")


def test_the_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scorers", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["hps-v2"]["sources"] == [{"source": "xswu/HPSv2", "files": ["HPS_v2_compressed.pt"]}]
    assert listed["edit-reward"]["needs"] == ["source_images", "instructions"]
    assert listed["scenes-oracle"]["weights"] == "in the package"


def test_another_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scorers", "pickscore"]) == 2
    assert "expected 'scorers' alone, with --json, or 'scorers verify NAME'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in references.CARDS if name.startswith("scenes-")])
def test_what_comes_with_the_package_scores_as_recorded(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scorers", "verify", name, "--device", "cpu"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| `{name}`"))
    assert "as recorded with this package: off by" in row
    assert row.count("|") == len(verify.COLUMNS) + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nsfw", "ocr"])
def test_what_may_be_installed_scores_as_recorded(name: str) -> None:
    scorer = load_scorer(name)
    said, passed = verify.compare(scorer, verify.score(scorer, verify.deal(name, scorer)), references.REFERENCES[name])
    assert passed, said


def test_the_cards_show_what_their_prompts_say() -> None:
    cards = scene_cards(64)
    pictures = (cards.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert all(score_image(picture, prompt).correct for picture, prompt in zip(pictures, cards.prompts, strict=True))


def test_other_scores_than_the_references_are_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(references.REFERENCES["scenes-oracle"], scores=(0.8, 0.9367, 0.9, 0.9171))
    monkeypatch.setattr(verify, "REFERENCES", {"scenes-oracle": wrong})
    assert main(["scorers", "verify", "scenes-oracle", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["compared"].startswith("NOT as recorded")
    assert not found["passed"]


@pytest.fixture
def small_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing large ones takes a second each."""
    monkeypatch.setattr(verify, "LARGE_SIZE", 96)


@pytest.mark.usefixtures("small_cards")
def test_a_made_checkpoint_is_verified_without_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "hps.safetensors"
    save_file(clip_weights(5), weights)
    made = clip_folder(tmp_path / "clip")
    flags = ["--checkpoint", str(weights), "--options", f"model={made}", "antialias=false", "--json"]
    assert main(["scorers", "verify", "hps-v2", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compared"] == "no reference numbers"
    assert found["weights"] == [f"hps.safetensors {verify.digest(weights)[:12]}"]
    assert len(set(found["scores"])) == 4
    assert found["repeated"] == 0
    assert found["alone"] < 1e-5


@pytest.mark.usefixtures("small_cards")
def test_a_made_judge_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Llava.save(tmp_path)
    capsys.readouterr()
    assert main(["scorers", "verify", "vqascore", "--checkpoint", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| `vqascore` | model.safetensors " in out
    assert "an issue with the row above is welcome" in out


def test_missing_weights_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*given: str) -> str:
        raise FileNotFoundError("there is no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert main(["scorers", "verify", "hps-v2.1"]) == 2
    assert "HPS_v2.1_compressed.pt is not in the local cache and cannot be fetched" in capsys.readouterr().err


def test_the_authors_pictures_are_fetched_and_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    contents = {}
    for i, address in enumerate(references.REFERENCES["image-reward"].pictures):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.webp", lossless=True)
        contents[address] = (tmp_path / f"{i}.webp").read_bytes()
    brightness = tuple((pixels / 255).mean(axis=(1, 2, 3)).tolist())
    reference = replace(references.REFERENCES["image-reward"], scores=brightness, tolerance=1e-5)
    from tests.brightness import Brightness

    monkeypatch.setattr(verify, "fetch", contents.__getitem__)
    said, passed = verify.compare(Brightness(), torch.zeros(4), reference)
    assert passed
    assert said.startswith("as README of THUDM/ImageReward, 0105ff1: off by")
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said, _ = verify.compare(Brightness(), torch.zeros(4), reference)
    assert said == "not compared: the pictures of README of THUDM/ImageReward, 0105ff1 cannot be fetched (OSError)"


def test_options_of_a_scorer_are_read() -> None:
    given = ["templates=a.txt", "templates=b.txt", "threshold=0.3", "relative=true", "base=some/folder"]
    assert scorer_options(given) == {
        "templates": ("a.txt", "b.txt"), "threshold": 0.3, "relative": True, "base": "some/folder",
    }  # fmt: skip
    assert scorer_options(["templates=a.txt"]) == {"templates": ("a.txt",)}


def test_an_option_without_a_value_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scorers", "verify", "hps-v2", "--options", "model"]) == 2
    assert "--options model: expected KEY=VALUE" in capsys.readouterr().err
