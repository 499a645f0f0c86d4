"""What comes with the package: names, ordinary folders, their cache, weights in few bits, and how large it all is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import DiffusionPipeline

import diffusion_align
from diffusion_align.packed import SMALL, from_bytes, pack, quantise, to_bytes, unpack
from diffusion_align.shipped import (
    CACHE_VARIABLE,
    MANIFEST,
    PACKED,
    RECORD,
    SHIPPED,
    asset_folder,
    is_complete,
    shipped_path,
)
from tests.processes import forked, found_in

ROOT = Path(__file__).parent.parent
MEBI = 2**20

#: Of the matrices to pack.
WIDTH = 64


def load_from(site: Path) -> None:
    """Loads a pipeline, a scorer and an evaluator that are stored in few bits, from the package in ``site``."""
    found_in(site)
    os.chdir(site.parent)
    import diffusion_align  # the one in site

    print(diffusion_align.__file__)
    DiffusionPipeline.from_pretrained(diffusion_align.shipped_path("scenes-uneven"))
    diffusion_align.load_scorer("scenes-vp-words")
    diffusion_align.load_evaluator("scenes-uneven-evaluator")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: what is tracked is not known")
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built as pip does, offline."""
    out = tmp_path_factory.mktemp("wheel")
    command = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", command], cwd=checkout, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_the_tracked_tree_is_small_enough_to_copy(checkout: Path) -> None:
    assert sum((checkout / name).stat().st_size for name in tracked()) < 40 * MEBI


@pytest.mark.slow
def test_the_wheel_is_small_and_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    assert wheel.stat().st_size < 32 * MEBI
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment, log = {**os.environ, CACHE_VARIABLE: str(tmp_path / "cache")}, tmp_path / "log"
    with forked(load_from, tmp_path / "site", log=log, environment=environment) as process:
        process.join()
    assert process.exitcode == 0, log.read_text()
    assert str(tmp_path / "site") in log.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_has_at_most_300_kilobytes(path: Path) -> None:
    assert path.stat().st_size <= 300_000


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda path: path.stem)
def test_a_picture_of_the_docs_has_at_most_150_kilobytes(path: Path) -> None:
    assert path.stat().st_size <= 150_000


@pytest.mark.parametrize("name", SHIPPED)
def test_every_name_gives_an_ordinary_folder_with_its_card(name: str) -> None:
    folder = shipped_path(name)
    assert (folder / "README.md").read_bytes() == (asset_folder(name) / "README.md").read_bytes()
    assert not [path for path in folder.rglob("*") if path.name == MANIFEST or path.name.endswith(PACKED)]


@pytest.mark.parametrize("name", SHIPPED)
def test_no_config_names_a_folder_of_the_machine_that_made_it(name: str) -> None:
    for path in asset_folder(name).rglob("*.json"):
        assert not re.search(r'"/[\w.-]+/', path.read_text()), path


def test_shipped_path_is_exported_from_the_top() -> None:
    assert diffusion_align.shipped_path is shipped_path


@pytest.mark.parametrize("name", ["scenes-uneven", "scenes-inpaint", "scenes-sd"])
def test_a_packed_pipeline_loads_with_plain_diffusers(name: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(shipped_path(name))
    assert all(weight.isfinite().all() for weight in pipeline.unet.parameters())


def test_what_pipelines_share_is_the_same_once_assembled() -> None:
    for path in ("vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"):
        assert (shipped_path("scenes-uneven") / path).read_bytes() == (asset_folder("scenes-sdxl") / path).read_bytes()


def test_the_packed_clip_loads_with_plain_open_clip() -> None:
    folder = f"local-dir:{shipped_path('scenes-clip')}"
    model, tokenizer = open_clip.create_model(folder), open_clip.get_tokenizer(folder)
    with torch.no_grad():
        assert model.encode_text(tokenizer(["a red star on a dark background"])).isfinite().all()


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'scenes-xl' does not come with the package.*: expected one of scenes-sdxl"):
        shipped_path("scenes-xl")


def test_what_is_stored_whole_is_not_copied(cache: Path) -> None:
    assert shipped_path("scenes-sdxl") == asset_folder("scenes-sdxl")
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["missing", "torn", "no record", "torn record"])
def test_a_damaged_folder_is_assembled_again(cache: Path, damage: str) -> None:
    folder = shipped_path("scenes-sd")
    part = folder / ("vae/diffusion_pytorch_model.safetensors" if damage in ("missing", "torn") else RECORD)
    whole = part.read_bytes()
    if damage.startswith("torn"):
        part.write_bytes(whole[: len(whole) // 2])
    else:
        part.unlink()
    assert shipped_path("scenes-sd") == folder
    assert part.read_bytes() == whole


def test_a_complete_folder_is_not_written_again(cache: Path) -> None:
    folder = shipped_path("scenes-sd")

    def written() -> dict[Path, tuple[int, int]]:
        """Each file's identity and time: a file that is written whole is a new one."""
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}

    before = written()
    assert shipped_path("scenes-sd") == folder
    assert before
    assert written() == before


def assemble() -> None:
    folder = shipped_path("scenes-sd")
    assert is_complete(folder)
    print(folder)


def test_processes_that_assemble_at_once_all_get_whole_folders(cache: Path, tmp_path: Path) -> None:
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    with ExitStack() as stack:
        runs = [stack.enter_context(forked(assemble, log=log, environment={**os.environ})) for log in logs]
        for run in runs:
            run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    (folder,) = (cache / "shipped").iterdir()
    assert [log.read_text() for log in logs] == [f"{folder}\n"] * 3
    assert not list(folder.rglob(".*"))


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=rf"{cache}.* cannot be written .*environment variable {CACHE_VARIABLE}"):
        shipped_path("scenes-sd")


def matrix(seed: int, scale: float = 1.0) -> torch.Tensor:
    """(64, 64) float16."""
    return (scale * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))).half()


@pytest.mark.parametrize("bits", [2, 5, 7, 8])
def test_rows_are_rounded_to_the_nearest_of_their_levels(bits: int) -> None:
    values = matrix(0)
    restored = unpack(pack({"w": values}, row_bits=bits))["w"]
    step = values.float().abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    # Half a step, the scale's own rounding (bfloat16) times the levels, and the result's (float16).
    allowed = step * (0.5 + 2**-9 * 2 ** (bits - 1)) + values.float().abs() * 2**-10
    assert bool(((restored.float() - values.float()).abs() <= allowed).all())
    assert restored.dtype == torch.float16


def test_a_difference_is_as_fine_as_it_is_small() -> None:
    parent = {"w": matrix(0)}
    child = {"w": (parent["w"].float() + 0.01 * matrix(1).float()).half()}
    error = unpack(pack(child, parent, difference_bits=8), parent)["w"].float() - child["w"].float()
    alone = unpack(pack(child, row_bits=8))["w"].float() - child["w"].float()
    assert error.abs().mean() < 0.1 * alone.abs().mean()


def test_what_equals_the_parents_is_not_stored() -> None:
    parent = {"w": matrix(0), "steps": torch.tensor(7)}
    packed = pack(parent, parent)
    assert sum(value.numel() for value in packed.values()) == 0
    restored = unpack(packed, parent)
    assert all(torch.equal(restored[key], parent[key]) for key in parent)


def test_vectors_small_matrices_and_other_dtypes_stay_exact() -> None:
    state = {
        "bias": matrix(0)[0],
        "statistics": matrix(1)[: SMALL // WIDTH - 1],
        "doubles": matrix(2).double(),
        "count": torch.arange(5),
        "scalar": torch.tensor(2.5).half(),
    }
    restored = unpack(from_bytes(to_bytes(pack(state)), "file"))
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[key], state[key]) and restored[key].dtype == state[key].dtype for key in state)


def test_a_kernel_of_another_shape_than_the_parents_stays_exact_and_a_matrix_is_packed() -> None:
    child = {"conv_in": torch.randn(48, 9, 3, 3, generator=torch.Generator().manual_seed(0)).half()}
    parent = {"conv_in": torch.zeros(48, 4, 3, 3).half()}
    assert torch.equal(unpack(pack(child, parent), parent)["conv_in"], child["conv_in"])
    assert "w|rows" in pack({"w": matrix(0)}, {"w": matrix(0)[:, 1:]})


def test_a_row_of_zeros_stays_zero() -> None:
    values = matrix(0)
    values[3] = 0
    assert unpack(pack({"w": values}))["w"][3].abs().max() == 0


def test_convolutions_have_one_scale_per_output_channel() -> None:
    kernel = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    integers, scale = quantise("w", kernel, 7)
    assert scale.shape == (32,)
    assert integers.shape == kernel.shape
    assert bool((integers.flatten(1).abs().amax(dim=1) == 63).all())


def test_differences_below_float16s_normal_range_survive() -> None:
    parent = {"w": torch.full((WIDTH, WIDTH), 1e-4).half()}
    child = {"w": (parent["w"].float() + 2e-6 * matrix(0).float()).half()}
    error = unpack(pack(child, parent, difference_bits=8), parent)["w"].float() - child["w"].float()
    assert error.abs().max() < 1.5e-7  # float16's step there is 6e-8


def test_packed_bytes_are_read_back_as_they_were() -> None:
    packed = pack({"w": matrix(0), "bias": matrix(1)[0]})
    again = from_bytes(to_bytes(packed), "file")
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[key], packed[key]) for key in packed)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"row_bits = {bits}: expected 2 to 8"):
        pack({"w": matrix(0)}, row_bits=bits)


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    values = matrix(0)
    values[1, 1] = torch.inf
    with pytest.raises(ValueError, match=r"layer\.w: a weight that is not finite"):
        pack({"layer.w": values})


@pytest.mark.parametrize("parent", [None, {}, {"w": torch.zeros(2, 2).half()}], ids=["none", "without it", "smaller"])
def test_a_difference_without_its_parent_is_refused_by_name(parent: dict[str, torch.Tensor] | None) -> None:
    packed = pack({"w": matrix(0)}, {"w": matrix(1)})
    with pytest.raises(ValueError, match="w: "):
        unpack(packed, parent)


def test_torn_bytes_are_refused_by_the_files_name() -> None:
    with pytest.raises(ValueError, match=r"model\.packed: cannot be read as packed weights"):
        from_bytes(to_bytes(pack({"w": matrix(0)}))[:-100], "model.packed")
