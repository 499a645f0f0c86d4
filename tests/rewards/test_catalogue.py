"""What the list of scorers says is what loading them does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusion_align.rewards import SCORERS, load_scorer
from diffusion_align.rewards.catalogue import FACTS, Part, catalogue, find_files, find_place, torch_hub
from diffusion_align.shipped import SHIPPED_SCORERS

#: What a loader asks for before it looks for weights.
ASKED = {"hps-v3": 1, "hps-v3++": 1, "edit-reward": 2}
FETCHED = [name for name, facts in FACTS.items() if facts.parts and name != "mps"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and of torch."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "hub"


def put(hub: Path, repository: str, name: str, content: str = "") -> Path:
    """A file as ``hf_hub_download`` leaves it."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("abc")
    path = folder / "snapshots" / "abc" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_every_scorer_is_listed() -> None:
    assert set(FACTS) == {*SCORERS, *SHIPPED_SCORERS}
    listed = {entry.name: entry for entry in catalogue()}
    assert set(FACTS) <= set(listed)
    assert listed["scenes-vp"].place == "in the package"
    assert 0.0005 < (listed["scenes-vp"].gigabytes or 0) < 0.01
    assert listed["nsfw"].place == "installed"


def test_weights_are_found_in_the_caches(hub: Path) -> None:
    assert find_place(FACTS["hps-v2"]) == "not here"
    put(hub, "xswu/HPSv2", "HPS_v2.1_compressed.pt")
    assert find_place(FACTS["hps-v2"]) == "not here"
    assert find_place(FACTS["hps-v2.1"]) == "cached"
    put(hub, "timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors")
    assert find_place(FACTS["aesthetic"]) == "partly cached"
    torch_file = torch_hub() / "checkpoints" / FACTS["aesthetic"].parts[1].files[0]
    torch_file.parent.mkdir(parents=True)
    torch_file.touch()
    assert find_place(FACTS["aesthetic"]) == "cached"
    assert torch_hub() == Path(torch.hub.get_dir())


def test_all_shards_must_be_there(hub: Path) -> None:
    part = Part("a/b", ("model.safetensors", "model.safetensors.index.json"))
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    put(hub, "a/b", "model.safetensors.index.json", json.dumps({"weight_map": dict(zip("xy", shards, strict=True))}))
    put(hub, "a/b", shards[0])
    assert find_files(part) == []
    second = put(hub, "a/b", shards[1])
    assert find_files(part) == [second.with_name(shards[0]), second]


@pytest.mark.parametrize("name", FETCHED)
def test_a_loader_looks_where_the_list_says(
    name: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(repo_id: str, *files: str, **options: object) -> str:
        asked.append(repo_id)
        raise FileNotFoundError("there is no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for address in ("huggingface_hub.hf_hub_download", "huggingface_hub.snapshot_download",
                    "open_clip.pretrained.hf_hub_download"):  # fmt: skip
        monkeypatch.setattr(address, fetch)
    (tmp_path / "text.txt").write_text("{text_prompt} <|Reward|>")
    given: dict[str, object] = {"templates": (str(tmp_path / "text.txt"),) * ASKED[name]} if name in ASKED else {}
    if "template=" in FACTS[name].options:
        given = {"template": str(tmp_path / "text.txt")}
    with pytest.raises(FileNotFoundError) as error:
        load_scorer(name, **given)
    assert any(part.source in f"{asked} {error.value}" for part in FACTS[name].parts)


@pytest.mark.parametrize("name", ["scenes-edit", "scenes-pal", "scenes-vp-inpaint", "scenes-oracle", "nsfw"])
def test_what_is_needed_is_listed(name: str) -> None:
    assert set(FACTS[name].needs) == load_scorer(name).needs
