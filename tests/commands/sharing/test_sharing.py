"""Model cards and what is sent to the hub, which is one on loopback here."""

from __future__ import annotations

import getpass
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from diffusion_align import load_adapter
from diffusion_align.cli import main, parse
from diffusion_align.commands.sharing import hub as hub_module
from diffusion_align.commands.sharing.cleaning import SECRETS, check_secrets, cleaned, cleaned_values
from diffusion_align.commands.sharing.hub import PushError, push
from diffusion_align.commands.sharing.sharing_options import PushOptions
from diffusion_align.training.settings import load_recipe, save_config
from tests.adapters.loras.policies import stirred
from tests.commands.sharing.fake_hub import FakeHub, fake_hub


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded world's DPO, with everything that a run leaves, its optimiser and pictures too."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    adapter = stirred(load_adapter("scenes-sdxl").train_lora(rank=4))
    adapter.save(folder)
    config = replace(load_recipe("scenes_dpo"), output_dir=str(folder), cache_dir="/home/someone/secret/cache")
    save_config(config, folder / "config.yaml")
    lines = [{"step": 100, "eval/win_rate": 0.7, "eval/win_rate_low": 0.6, "eval/win_rate_high": 0.8}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    counts = {"name": "scenes-pairs", "counts": {"rows": 9, "ties": 2, "corrupt": 1}, "used": 6}
    (folder / "data.json").write_text(json.dumps(counts))
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "optimizer.pt").write_bytes(b"state")
    (folder / "report.html").write_text("<p>")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tuned"))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as found:
        yield found


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def made(run: Path, *flags: str) -> ModelCard:
    assert main(["card", str(run), "--num-pictures", "0", *flags]) == 0
    return ModelCard.load(run / "README.md")


def test_the_header_is_what_the_hub_reads_and_the_text_says_what_is_known(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = made(run, "--hub-model-id", "me/tuned")
    assert capsys.readouterr().out.strip() == str(run / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("diffusers", "text-to-image", "apache-2.0")
    assert set(data["tags"]) >= {"lora", "template:sd-lora", "diffusers-training", "diffusion-align", "dpo"}
    assert "base_model" not in data  # scenes-sdxl is not on the hub
    assert "datasets" not in data
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("win_rate", 0.7)
    assert "[0.600, 0.800]" in result.metric_name
    assert yaml.safe_load(card.data.to_yaml()) == data
    for said in ("2311.12908", "ties: 2", "corrupt: 1", "70.0% [60.0%, 80.0%]", "No people have judged", "`beta`",
                 "load_lora_weights", "no pictures"):  # fmt: skip
        assert said in card.text, said
    assert "/home/someone" not in str(card)
    assert str(run.parent) not in str(card)


def test_what_a_person_wrote_stays_and_our_part_is_written_anew(run: Path) -> None:
    made(run)
    path = run / "README.md"
    text = path.read_text().replace("library_name: diffusers", "library_name: diffusers\nlanguage: en")
    path.write_text(
        text.replace("<!-- diffusion-align: begin -->", "My words.\n\n<!-- diffusion-align: begin -->") + "\nMore.\n"
    )
    card = made(run, "--license", "openrail++")
    assert card.text.index("My words.") < card.text.index("# REPO") < card.text.index("More.")
    assert card.text.count("## Use") == 1
    assert (card.data.to_dict()["license"], card.data.to_dict()["language"]) == ("openrail++", "en")


def test_a_licence_is_known_or_given_and_never_guessed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(load_recipe("scenes_dpo"), model="somebody/model", dataset="somebody/pairs")
    save_config(config, run / "config.yaml")
    data = made(run).data.to_dict()
    assert "license" not in data
    assert "the card states none; give --license" in capsys.readouterr().err
    assert (data["base_model"], data["base_model_relation"]) == ("somebody/model", "adapter")
    assert data["datasets"] == ["somebody/pairs"]
    save_config(replace(config, model="stabilityai/stable-diffusion-xl-base-1.0"), run / "config.yaml")
    assert made(run).data.to_dict()["license"] == "openrail++"


@pytest.mark.slow
def test_the_gallery_is_drawn_and_the_code_of_the_card_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe("scenes_dpo", validation_inference_steps=2)
    save_config(config, run / "config.yaml")
    assert main(["card", str(run), "--num-pictures", "2", "--hub-model-id", "me/tuned"]) == 0
    card = ModelCard.load(run / "README.md")
    shown = card.data.to_dict()["widget"]
    assert len(shown) == 2
    assert "<Gallery />" in card.text
    for each in shown:
        picture = Image.open(run / each["output"]["url"])
        assert picture.size == (64, 64)
        assert not picture.info
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert code is not None
    (tmp_path / "me").mkdir()
    shutil.copytree(run, tmp_path / "me" / "tuned")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code[1].replace('background")', 'background", num_inference_steps=2)'), names)
    assert isinstance(names["image"], Image.Image)
    assert torch.cuda.is_available() or names["device"] == "cpu"


@pytest.mark.usefixtures("online")
def test_the_hub_sees_the_allow_list_and_nothing_else(
    run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    flags = ["push", str(run), "me/tuned", "--num-pictures", "0"]
    assert main([*flags, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "nothing was sent" in told
    assert not hub.created
    assert main([*flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    wanted = {"README.md", "config.yaml", "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"}
    assert set(hub.files) == set(said["files"]) == wanted
    assert all(name in told for name in wanted)
    assert hub.private
    assert said["private"] is True
    assert hub.tokens == {"Bearer hf_" + "x" * 20}
    assert hub.files["pytorch_lora_weights.safetensors"] == (run / "pytorch_lora_weights.safetensors").read_bytes()
    for name in ("README.md", "config.yaml"):
        assert b"/home/someone" not in hub.files[name]
        assert str(run.parent).encode() not in hub.files[name]
    assert yaml.safe_load(hub.files["config.yaml"])["beta"] == 1000.0
    assert main([*flags, "--public"]) == 0
    assert not hub.private
    hub.files, hub.kept = {}, False  # what is public already stays public, so who pushes must know
    assert main(flags) == 2
    assert "me/tuned is public: give --public" in capsys.readouterr().err
    assert not hub.files


@pytest.mark.slow
@pytest.mark.usefixtures("online")
def test_a_training_run_ends_on_the_hub(
    hub: FakeHub, sdxl_folder: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    data = ["--model", str(sdxl_folder), "--dataset", str(pairs_folder), "--validation-inference-steps", "1"]
    short = ["--max-steps", "1", "--output-dir", str(tmp_path / "run"), "--report-to", "none", "--no-progress"]
    assert main(["train", "dpo", *data, *short, "--push-to-hub", "--hub-model-id", "me/run"]) == 0
    assert "optimizer" not in " ".join(hub.files)
    assert {"README.md", "config.yaml", "pytorch_lora_weights.safetensors", "images/00.png"} <= set(hub.files)
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (kept["push_to_hub"], kept["hub_model_id"]) == (False, None)  # who repeats it must ask again
    assert b"rows" in hub.files["README.md"]


@pytest.mark.usefixtures("online")
def test_without_a_network_the_card_is_there_and_the_exit_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    assert main(["push", str(run), "me/tuned", "--num-pictures", "0"]) == 1
    assert f"card written to {run / 'README.md'}, not pushed" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="not pushed"):
        push(PushOptions(run=str(run), repo="me/tuned", num_pictures=0), HfApi())


@pytest.mark.parametrize("place", ["README.md", "config.yaml"])
def test_what_looks_like_a_secret_is_refused(
    place: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "HfApi", None, raising=False)
    made(run)
    secret = "hf_" + "abcdefghij" * 3
    with (run / place).open("a") as file:
        file.write(f"# {secret}\n" if place == "README.md" else f"init_weights: {secret}\n")
    if place == "config.yaml":
        settings = yaml.safe_load((run / place).read_text())
        (run / place).write_text(yaml.safe_dump(settings | {"init_weights": secret}))
    assert main(["push", str(run), "me/tuned", "--dry-run", "--num-pictures", "0"]) == 2
    error = capsys.readouterr().err
    assert "looks like a secret (Hugging Face)" in error
    assert secret not in error


def test_paths_and_names_of_this_machine_are_cut() -> None:
    assert cleaned("see /home/me/runs/dpo and ~/data/x.txt, https://a.b/c/d") == "see dpo and x.txt, https://a.b/c/d"
    assert cleaned("C:\\Users\\me\\runs\\dpo") == "dpo"
    assert cleaned("ratio 1/2 of runs/dpo") == "ratio 1/2 of runs/dpo"
    assert cleaned_values({"a": ["/x/y/z", 3], "b": None}) == {"a": ["z", 3], "b": None}
    user = getpass.getuser()
    assert user == "root" or len(user) <= 2 or user not in cleaned(f"by {user} himself")
    for text in ("ghp_" + "a" * 30, "sk-" + "b" * 40, "AKIA" + "C" * 16, "http://me:pw@host/x"):
        with pytest.raises(ValueError, match="looks like a secret"):
            check_secrets(text, "file")
    assert len(SECRETS) == 8
    check_secrets("hf_hub_download of https://huggingface.co", "file")


def test_a_card_shows_the_evaluation_that_its_run_was_in(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = {"wins": 6, "losses": 2, "ties": 0, "rate": 0.75, "interval": [0.6, 0.9], "count": 8, "confidence": 0.95}
    verdict = {"side": "mine", "baseline": "base", "label": "matched", "scorer": "scenes-vp", "win_rate": rate}
    table = {
        "sides": [{"name": "base", "side": "base"}, {"name": "mine", "side": f"{run}@guidance_scale=3"}],
        "prompts": {"count": 4}, "seeds_per_prompt": 2, "verdicts": [verdict], "note": "Scorers are no people.",
        "warnings": ["scenes-vp judges mine"],
        "scorers": {"scenes-vp": {"trained_on": {"mine": "scorers of its config"}}},
    }  # fmt: skip
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "table.json").write_text(json.dumps(table))
    text = made(run, "--evaluation", str(tmp_path / "e")).text
    for said in ("75.0% [60.0%, 90.0%]", "guidance matched", "no: scorers of its config", "Scorers are no people",
                 "No judge that is independent"):  # fmt: skip
        assert said in text
    table["sides"] = table["sides"][:1]
    (tmp_path / "e" / "table.json").write_text(json.dumps(table))
    assert main(["card", str(run), "--evaluation", str(tmp_path / "e")]) == 2
    assert "is no side of it" in capsys.readouterr().err


def test_what_is_no_finished_run_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in ((tmp_path / "no", "no such folder"), (tmp_path, "this is no run's folder")):
        assert main(["card", str(folder)]) == 2
        assert message in capsys.readouterr().err
    for file in run.glob("*.safetensors"):
        file.unlink()
    assert main(["card", str(run)]) == 2
    assert "no weights in it yet" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--repo tuned: expected USER/NAME"):
        parse(["push", str(run), "tuned"])
    with pytest.raises(ValueError, match="push_to_hub needs hub_model_id"):
        parse(["train", "dpo", "--push-to-hub"])
    with pytest.raises(ValueError, match="is for push_to_hub"):
        parse(["train", "dpo", "--hub-model-id", "me/x"])
    assert parse(["train", "dpo", "--push-to-hub", "--hub-model-id", "me/x"])[1].hub_model_id == "me/x"
