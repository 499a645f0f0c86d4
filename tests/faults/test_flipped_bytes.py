"""A byte that changed on the disk: found and named, or of no consequence; what has no checksum is listed here, too."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.adapters.policy_files import Source, load_network, save_network
from diffusion_align.commands.annotate import check_pictures
from diffusion_align.data.cache import CachedPairs, CacheError
from diffusion_align.data.draws import FixedDraws
from diffusion_align.data.tables import open_shards
from diffusion_align.files import append_rows, read_journal, read_object
from diffusion_align.guidance.judges.evaluator import EvaluatorSettings, LatentEvaluator
from diffusion_align.packed import from_bytes, pack, to_bytes
from diffusion_align.pictures import decoded_picture
from diffusion_align.rewards import load_scorer
from diffusion_align.shipped import CACHE_VARIABLE, shipped_path
from diffusion_align.training.engine.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from diffusion_align.training.engine.metrics import read_metrics
from diffusion_align.training.pairs.error_memory import ErrorMemory
from diffusion_align.training.settings import load_run

from .harness import ALL_COMMANDS

#: What a damaged file may raise: all that the command line turns into one line.
REFUSALS = (ValueError, OSError, CheckpointError, CacheError)


@dataclass(frozen=True)
class Kind:
    """A kind of file that is written.

    Attributes:
        maker: name of the command, or of the fixture's folder, that leaves it.
        file: its path there.
        read: gives what is in it, comparable.
        certain: whether every flip is found that changes what is read. What people edit has no checksum: there only
            flips that break the syntax are found.
    """

    maker: str
    file: str
    read: Callable[[Path], Any]
    certain: bool = True


def flips(content: bytes, count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """Places, half of them among the first and last 512 bytes, and the content with one bit flipped there."""
    rng = random.Random(seed)
    for number in range(count):
        place = rng.randrange(len(content))
        if number % 4 == 0:
            place %= 512
        elif number % 4 == 1:
            place = len(content) - 1 - place % min(512, len(content))
        place %= len(content)
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        yield place, bytes(changed)


def check(kind: Kind, folder: Path, count: int, seed: int = 0) -> None:
    """Flip bits of the file in ``folder``, one at a time."""
    (file,) = sorted(folder.glob(kind.file))[:1]
    content, expected = file.read_bytes(), kind.read(file)
    missed = []
    for place, changed in flips(content, count, seed):
        file.write_bytes(changed)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found, said = kind.read(file), [str(warning.message) for warning in told]
            except REFUSALS as error:
                found, said = None, [str(error)]
        if isinstance(found, list) and found == expected[:-1]:
            continue  # a last line without its end is made again
        if not equal(found, expected) and not any(file.name in text or file.parent.name in text for text in said):
            missed.append(place)
    assert not (kind.certain and missed), f"flips that nobody saw in {file.name}, of {len(content)} bytes: {missed}"


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(nan=-1), other.nan_to_num(nan=-1))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


def checkpoint_of(file: Path) -> Any:
    state = load_checkpoint(find_checkpoint(str(file.parent), file.parent)[0])
    return {"values": state.values, **state.tensors}


def examples_of(file: Path) -> Any:
    cached = CachedPairs(file.parent)
    examples = [cached.example(i, 0, False) for i in range(len(cached))]
    return {
        i: {"caption": e.caption, "posterior": torch.cat(e.posterior or ()), "prompt": e.cond and e.cond.embeds}
        for i, e in enumerate(examples)
    }


def table_of(file: Path) -> Any:
    shards = open_shards(file, "train")
    assert shards is not None
    columns = ["caption", "jpg_0", "jpg_1", "label_0"]
    return tuple(
        row
        for number, group in enumerate(shards.groups)
        for row in shards.rows(number, np.arange(group.first, group.first + group.rows), columns)
    )


def pictures_of(file: Path) -> Any:
    out = file.parent.parent
    for number, row in enumerate(read_journal(out / "rows.jsonl")[1:]):
        check_pictures(out / "images", number, row)
    return file.read_bytes()


def pixels_of(file: Path) -> Any:
    return np.asarray(decoded_picture(file, str(file))).tobytes()


def scorer_of(file: Path) -> Any:
    return {**load_scorer(file.parent).state_dict()}


def evaluator_of(file: Path) -> Any:
    return {**LatentEvaluator.from_pretrained(file.parent).state_dict()}


def memory_of(file: Path) -> Any:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        table = remembered(file.parent).table
    for warning in told:
        warnings.warn(str(warning.message), stacklevel=1)
    return table


def remembered(folder: Path) -> ErrorMemory:
    return ErrorMemory(folder, {"model": "m"}, ["row 0", "row 1"], FixedDraws(0, 2), torch.device("cpu"))


@pytest.fixture(scope="session")
def adapter() -> Adapter:
    return load_adapter("scenes-sdxl")


@pytest.fixture(scope="session")
def folders(whole: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a command or, by its name, this module left."""
    place = tmp_path_factory.mktemp("written")

    def folder(name: str) -> Path:
        if name in ALL_COMMANDS:
            return whole(name)
        made = place / name
        if not made.exists():
            made.mkdir()
            MAKERS[name](made)
        return made

    return folder


def make_memory(folder: Path) -> None:
    memory = remembered(folder)
    memory.learn([0, 1, 2], torch.rand(2, 3))
    memory.save()


SMALL = EvaluatorSettings(4, 8, 16, 0, width=8, features=8)
MAKERS: dict[str, Callable[[Path], object]] = {
    "scorer": lambda folder: load_scorer("scenes-vp").save_pretrained(folder / "scorer"),  # type: ignore[operator]
    "clip": lambda folder: load_scorer("scenes-clip").save_pretrained(folder / "scorer"),  # type: ignore[operator]
    "evaluator": lambda folder: LatentEvaluator(SMALL).save_pretrained(folder / "e"),
    "memory": make_memory,
    "pictures": lambda folder: Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "0.png"),
    "journal": lambda folder: append_rows(folder / "scores.jsonl.partial", [{"a": i, "b": "x"} for i in range(5)]),
}

STEP = "run/checkpoint-00000004"
KINDS = {
    "checkpoint's weights": Kind("train dpo", f"{STEP}/policy.safetensors", checkpoint_of),
    "checkpoint's optimiser": Kind("train dpo", f"{STEP}/optimizer.safetensors", checkpoint_of),
    "checkpoint's random state": Kind("train dpo", f"{STEP}/rng.safetensors", checkpoint_of),
    "checkpoint's state.json": Kind("train dpo", f"{STEP}/state.json", checkpoint_of),
    "checkpoint's manifest": Kind("train dpo", f"{STEP}/manifest.json", checkpoint_of),
    "config.yaml": Kind("train dpo", "run/config.yaml", lambda file: load_run(file.parent), certain=False),
    "metrics.jsonl": Kind("train dpo", "run/metrics.jsonl", read_metrics, certain=False),
    "cache's latents": Kind("cache", "cache/images-00000.safetensors", examples_of),
    "cache's prompts": Kind("cache", "cache/prompts-00000.safetensors", examples_of),
    "cache's manifest": Kind("cache", "cache/manifest.json", examples_of),
    "cache's shards.json": Kind("cache", "cache/shards.json", read_object),
    "error memory": Kind("memory", "*.safetensors", memory_of),
    "rows.jsonl": Kind("annotate", "pairs/rows.jsonl", read_journal),
    "annotated pictures": Kind("annotate", "pairs/images/000000-0.jpg", pictures_of),
    "annotated pairs": Kind("annotate", "pairs/*.parquet", table_of),
    "score partial": Kind("journal", "scores.jsonl.partial", read_journal),
    "drawn pictures": Kind("pictures", "*.png", pixels_of),
    "scorer's weights": Kind("scorer", "scorer/model.safetensors", scorer_of),
    "scorer.json": Kind("scorer", "scorer/scorer.json", scorer_of),
    "scorer's checksums": Kind("scorer", "scorer/checksums.json", scorer_of),
    "CLIP's weights": Kind("clip", "scorer/open_clip_model.safetensors", scorer_of),
    "evaluator's weights": Kind("evaluator", "e/model.safetensors", evaluator_of),
    "evaluator.json": Kind("evaluator", "e/evaluator.json", evaluator_of),
}


#: What only ``make test-faults`` tries: a run of their own is needed.
DEAR = ("annotate",)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.maker not in DEAR])
def test_a_flipped_bit_is_named_or_changes_nothing(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders(KINDS[name].maker), tmp_path / "copy")
    check(KINDS[name], copied, 2)


@pytest.mark.faults
@pytest.mark.parametrize("name", KINDS)
def test_many_flipped_bits_are_named(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders(KINDS[name].maker), tmp_path / "copy")
    slow = KINDS[name].maker in ("scorer", "clip", "evaluator", "cache")
    check(KINDS[name], copied, 60 if slow else 400, seed=1)


@pytest.mark.parametrize("count", [6, pytest.param(400, marks=pytest.mark.faults)])
@pytest.mark.parametrize("layout", ["pytorch_lora_weights", "kohya_lora_weights"])
def test_a_flipped_bit_of_a_lora_is_named(
    layout: str, count: int, adapter: Adapter, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    def lora_of(file: Path) -> Any:
        return {a: {"down": low.down, "up": low.up} for a, low in adapter.loras.read(file).items()}

    shutil.copy(folders("train dpo") / "run" / f"{layout}.safetensors", tmp_path)
    check(Kind("", f"{layout}.safetensors", lora_of), tmp_path, count)


@pytest.mark.faults
def test_a_flipped_bit_of_a_network_is_named(adapter: Adapter, sdxl_folder: Path, tmp_path: Path) -> None:
    save_network(load_adapter(sdxl_folder).pipeline, "unet", tmp_path)

    def network_of(file: Path) -> Any:
        model = load_adapter(sdxl_folder)
        load_network(model.pipeline, "unet", Source(file.parent))
        return {**model.network.state_dict()}

    check(Kind("", "unet/*.safetensors", network_of), tmp_path, 3)
    shutil.rmtree(tmp_path / "unet")
    save_network(load_adapter(sdxl_folder).pipeline, "unet", tmp_path)
    check(Kind("", "unet/config.json", network_of), tmp_path, 3)


@pytest.mark.parametrize("count", [2, pytest.param(100, marks=pytest.mark.faults)])
def test_a_flipped_bit_of_an_unpacked_asset_is_made_good(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    folder = shipped_path("scenes-vp")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for _, changed in flips(whole, count, 0):
        weights.write_bytes(changed)
        assert shipped_path("scenes-vp") == folder
        assert weights.read_bytes() == whole


@pytest.mark.parametrize("count", [10, pytest.param(2000, marks=pytest.mark.faults)])
def test_a_flipped_bit_of_packed_weights_is_named(count: int) -> None:
    content = to_bytes(pack({"w": torch.randn(64, 64).half(), "b": torch.randn(7)}))
    expected = from_bytes(content, "weights.packed")
    for place, changed in flips(content, count, 0):
        try:
            found, said = from_bytes(changed, "weights.packed"), ""
        except ValueError as error:
            found, said = {}, str(error)
        assert equal(found, expected) or "weights.packed" in said, place
