"""The benchmark of true sizes, on small ones: layouts, pairs, and memory of a process."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.true_size.sources import linked, write_pairs
from benchmarks.true_size.use import estimate
from benchmarks.true_size.watched import run_watched
from diffusion_align.data.pairs import load_pairs
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.plan import make_plan

MIB = 2**20


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Names of a pipeline's files: the UNet in two variants, the VAE in one."""
    for name in (
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
    ):  # fmt: skip
        file = tmp_path / "pipeline" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "pipeline"


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("variant", "middle"), [(None, ""), ("fp16", ".fp16")])
def test_every_part_is_there_in_one_variant(variant: str | None, middle: str, pipeline: Path, tmp_path: Path) -> None:
    weights = f"diffusion_pytorch_model{middle}.safetensors"
    assert files(linked(pipeline, tmp_path / "place", variant)) == {
        "model_index.json": "model_index.json",
        "unet/config.json": "unet/config.json",
        f"unet/{weights}": "unet/diffusion_pytorch_model.safetensors",
        f"vae/{weights}": "vae/diffusion_pytorch_model.fp16.safetensors",
    }


def test_without_weights_only_configs_are_there(pipeline: Path, tmp_path: Path) -> None:
    names = files(linked(pipeline, tmp_path / "place", None, weights=False)).keys()
    assert names == {"model_index.json", "unet/config.json"}


def test_a_part_without_one_weight_file_is_named(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").rename(pipeline / "unet" / "model.ema.safetensors")
    with pytest.raises(ValueError, match=r"unet: expected one weight file, found .*fp16"):
        linked(pipeline, tmp_path / "place", None)


def test_the_pairs_are_pairs(tmp_path: Path) -> None:
    pairs = load_pairs(write_pairs(tmp_path, count=2, side=32))
    assert len(pairs) == 2


@pytest.mark.slow
def test_memory_is_what_the_process_allocated() -> None:
    def holding(mebibytes: int) -> int:
        # Not from the heap: an earlier test may have left free memory there.
        with mmap.mmap(-1, mebibytes * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            for place in range(0, len(held), MIB):
                held[place : place + MIB] = b"1" * MIB
            time.sleep(0.2)
        return 0

    few, many = (run_watched(lambda n=n: holding(n), "holding") for n in (8, 72))  # type: ignore[misc]
    assert 56 * MIB < many.own - few.own < 80 * MIB  # beside what else the process does meanwhile


def failing() -> int:
    print("no such data")
    return 3


def raising() -> None:
    raise ValueError("no such data")


@pytest.mark.parametrize(("program", "code"), [(failing, 3), (raising, 1)])
def test_a_failing_command_shows_its_last_lines(program: Callable[[], object], code: int) -> None:
    with pytest.raises(RuntimeError, match=rf"(?s)drawing failed \(exit code {code}\).*no such data"):
        run_watched(program, "drawing")


def test_a_process_ends_when_enough_is_seen(tmp_path: Path) -> None:
    def program() -> None:
        (tmp_path / "log").touch()
        time.sleep(60)

    started = time.perf_counter()
    run_watched(program, "drawing", (tmp_path / "log").exists)
    assert time.perf_counter() - started < 10


@pytest.mark.slow
def test_the_plans_total_is_read() -> None:
    plan = make_plan(DPOConfig(model="scenes-sd"))
    assert 0 < estimate(plan) < 1
    with pytest.raises(ValueError, match="no total"):
        estimate("settings")
