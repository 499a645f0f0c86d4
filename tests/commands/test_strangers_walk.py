"""A stranger's walk with own pictures, from a folder and a table to a card and to other programs.

All commands run in one process that is not this one: pytest would take warnings away before they reach the console.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

from diffusion_align import shipped_path
from diffusion_align.scenes.world.grammar import sample_prompt, sample_scene
from diffusion_align.scenes.world.render import render
from tests.adapters.loras.policies import DIFFUSERS, KOHYA, as_comfyui_applies
from tests.sampling.test_infotext import as_a1111_reads

PROMPT, SEED, STEPS = "a small red star on a dark background", 5, 3
DRAWN = ["--num-inference-steps", str(STEPS)]
#: All that may stand on stderr: what is read, what was found, how far it is, what to be careful about.
SAID = re.compile(
    r"\S+\.parquet: 12 pairs"
    r"|data: \S+: 12 rows, 12 pairs used; left out: none"
    r"|validation at step \d+: win rate .*"
    r"|(steps|evaluate): .*\d+ of \d+.*"
    r"|2 prompts x 1 seeds: too few prompts to tell any win rate from 50%"
)
SESSION = """
import json, sys
from diffusion_align.cli import main
told = []
for words in json.loads(sys.argv[1]):
    for stream in (sys.stdout, sys.stderr):
        print("### next", file=stream, flush=True)
    told.append(main(words))
print("### next", json.dumps(told))
"""


@dataclass(frozen=True)
class Told:
    """What one command said."""

    status: int
    out: str
    err: str


def walked(folder: Path, lines: list[list[str]]) -> list[Told]:
    """Every command's words, run one after another in ``folder``."""
    command = [sys.executable, "-c", SESSION, json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    _, *out, told = done.stdout.split("### next")
    _, *err = done.stderr.split("### next")
    return [Told(*each) for each in zip(json.loads(told), out, err, strict=True)]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in two folders by whether they are liked, a table of pairs, and a file of prompts."""
    folder, rng, rows = tmp_path_factory.mktemp("stranger"), np.random.default_rng(0), []
    for name in ("chosen", "rejected"):
        (folder / "pictures" / name).mkdir(parents=True)
    for number in range(12):
        spec = sample_prompt(rng)
        liked, disliked = (png(render(sample_scene(each, rng))) for each in (spec, sample_prompt(rng)))
        (folder / "pictures" / "chosen" / f"{number}.png").write_bytes(liked)
        (folder / "pictures" / "chosen" / f"{number}.txt").write_text(spec.text())
        (folder / "pictures" / "rejected" / f"{number}.png").write_bytes(disliked)
        rows.append({"jpg_0": disliked, "jpg_1": liked, "caption": spec.text(), "label_0": 0.0})
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    (folder / "prompts.txt").write_text("\n".join(row["caption"] for row in rows[:2]))
    return folder


@pytest.fixture(scope="module")
def walk(home: Path) -> dict[str, Told]:
    """What the commands said, by what they are for."""
    training = ["train", "dpo", "--model", "scenes-sdxl", "--learning-rate", "1e-2"]
    validated = ["--validation-prompts", "prompts.txt", "--validation-scorer", "scenes-oracle"]
    lines = {
        "import": ["data", "import", "pictures", "--out", "data"],
        "check": ["data", "check", "data"],
        "check table": ["data", "check", "pairs.parquet"],
        "plan": [*training, "--dataset", "pairs.parquet", "--dry-run"],
        "train": [*training, "--dataset", "data", "--output-dir", "run", "--max-steps", "4", "--eval-steps", "4",
                  "--logging-steps", "2", *validated, "--validation-inference-steps", str(STEPS)],
        "evaluate": ["evaluate", "base", "run", "--prompts", "prompts.txt", "--scorers", "scenes-vp", "--seeds",
                     "1", "--out", "compared", *DRAWN],
        "card": ["card", "run", "--evaluation", "compared"],
        "generate": ["generate", PROMPT, "--lora", "run", "--seed", str(SEED), "--num-images", "1", *DRAWN],
    }  # fmt: skip
    return dict(zip(lines, walked(home, list(lines.values())), strict=True))


@pytest.mark.slow
def test_a_stranger_comes_from_pictures_to_a_card_and_to_other_programs(home: Path, walk: dict[str, Told]) -> None:
    for name, told in walk.items():
        assert told.status == 0, (name, told)
        strange = [line for line in told.err.splitlines() if line and not SAID.fullmatch(line)]
        assert not strange, (name, strange)
        assert not re.search(r"Warning|Traceback|\r|\x1b", told.out), name
    assert "pairs: 12" in walk["import"].out
    assert "nothing that must be mended" in walk["check"].out
    assert "nothing that must be mended" in walk["check table"].out
    assert re.search(r"pairs used +12", walk["plan"].out)
    assert "total, per device" in walk["plan"].out
    following = "diffusion-align evaluate base run"
    for said in ("win rate", "run/samples/step-000004.png", "run/report.html", following):
        assert said in walk["train"].out

    report = unescape((home / "run" / "report.html").read_text())
    for said in (
        "over the base, by the validation scorer",
        "<svg",
        "data:image/png",
        following,
        "unreadable, found in this run",
    ):
        assert said in report, said
    compared = (home / "compared" / "report.html").read_text()
    assert "data:image/png" in compared
    assert json.loads((home / "compared" / "table.json").read_text())["verdicts"][0]["side"] == "run"
    card = ModelCard.load(home / "run" / "README.md")
    assert "by scenes-vp" in card.data.eval_results[0].metric_name
    for each in card.data.to_dict()["widget"]:
        Image.open(home / "run" / each["output"]["url"]).verify()

    (file,) = (home / "images").glob("*.png")
    with Image.open(file) as picture:
        told = as_a1111_reads(picture.info["parameters"])
        ours = np.array(picture).astype(int)
    assert (told["Prompt"], told["Seed"], told["Size"]) == (PROMPT, str(SEED), "64x64")
    content = (home / "run" / KOHYA).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")  # A1111 hashes what comes after it
    assert told["Lora hashes"] == f"run: {hashlib.sha256(content[header:]).hexdigest()[:12]}"
    plain = pixels(pipeline())
    with_diffusers = pipeline()
    with_diffusers.load_lora_weights(home / "run", weight_name=DIFFUSERS)
    assert np.abs(pixels(with_diffusers) - ours).max() <= 1
    assert np.abs(pixels(as_comfyui_applies(pipeline(), home / "run" / KOHYA)) - ours).max() <= 1
    assert np.abs(plain - ours).max() > 3


def pipeline() -> DiffusionPipeline:
    """The base model as diffusers alone has it."""
    found = DiffusionPipeline.from_pretrained(shipped_path("scenes-sdxl"))
    found.set_progress_bar_config(disable=True)
    return found


def pixels(of: DiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(SEED)
    drawn = of(PROMPT, num_inference_steps=STEPS, guidance_scale=5.0, generator=generator).images[0]
    return np.array(drawn).astype(int)
