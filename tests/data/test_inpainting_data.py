"""Pictures with holes: masks, folders, the embedded world."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align.data import CorruptImageError
from diffusion_align.data.holes import load_holes
from diffusion_align.data.inpainting import PictureFolder, open_inpainting
from diffusion_align.data.loader import Corruption
from diffusion_align.data.masks import MASKS, sample_mask
from diffusion_align.scenes.world.scene_holes import SceneHoles


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_masks_cover_a_part_of_any_size(kind: str, size: tuple[int, int]) -> None:
    shares = []
    for seed in range(20):
        mask = MASKS[kind](np.random.default_rng(seed), *size)
        assert mask.shape == size
        shares.append(mask.mean())
    assert min(shares) > 0.01
    assert max(shares) < 0.95
    if kind == "half":
        assert set(shares) == {0.5}
        assert len({MASKS[kind](np.random.default_rng(seed), *size).tobytes() for seed in range(40)}) == 4


def test_random_masks_follow_the_seed_and_the_kinds() -> None:
    first, second = (sample_mask(np.random.default_rng(3), 32, 32) for _ in range(2))
    assert (first == second).all()
    border = sample_mask(np.random.default_rng(0), 32, 32, ["border"])
    assert border[0].all()
    assert not border[16, 16]


def picture(path: Path, value: int, size: tuple[int, int] = (80, 64)) -> None:
    Image.new("RGB", size, (value, value, value)).save(path)


def test_a_folder_gives_captions_and_masks(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 100)
    picture(tmp_path / "b.png", 200)
    white = np.zeros((64, 80), np.uint8)
    white[:, :40] = 255
    Image.fromarray(white).save(tmp_path / "hole.png")
    rows = [{"file_name": "a.png", "caption": "grey", "mask": "hole.png"}, {"file_name": "b.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    holes = load_holes(open_inpainting(str(tmp_path)), [0, 1, 0], [5, 6, 7], 32, ("half",))
    assert holes.prompts == ["grey", "", "grey"]
    assert torch.allclose(holes.pictures[:, 0, 0, 0], torch.tensor([100.0, 200.0, 100.0]) / 255)
    assert torch.equal(holes.masks[0], holes.masks[2])
    assert holes.masks[0, 0, :, :15].all()
    assert not holes.masks[0, 0, :, 17:].any()
    assert float(holes.masks[1].mean()) == 0.5
    repeated = holes.repeat_each(2)
    assert repeated.prompts == ["grey", "grey", "", "", "grey", "grey"]
    composite = holes.composite(torch.zeros_like(holes.pictures))
    outside = (holes.masks < 0.5).expand_as(composite)
    assert torch.equal(composite[outside], holes.pictures[outside])
    assert float(composite[~outside].max()) == 0


def test_pictures_without_metadata_have_empty_prompts(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", 10)
    source = PictureFolder(tmp_path)
    assert len(source) == 1
    assert source[0].prompt == ""


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_inpainting(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        PictureFolder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png"}')
    with pytest.raises(FileNotFoundError, match=r"gone\.png, which is not there"):
        PictureFolder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"name": "a.png"}')
    with pytest.raises(ValueError, match="row 1: file_name is missing; found name"):
        PictureFolder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        PictureFolder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "torn.png").write_bytes(b"no picture")
    with pytest.raises(CorruptImageError, match=r"torn\.png cannot be decoded"):
        PictureFolder(tmp_path)[0]


def test_pictures_with_holes_are_replaced_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"no picture")
    picture(tmp_path / "b.png", 100)
    picture(tmp_path / "c.png", 200)
    picture(tmp_path / "full.png", 255)
    rows = [{"file_name": "torn.png"}, {"file_name": "b.png", "mask": "full.png"}, {"file_name": "c.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source, corruption = PictureFolder(tmp_path), Corruption(2)
    holes = load_holes(source, [0, 1, 2], [1, 1, 1], 32, ("box",), corruption)
    assert torch.allclose(holes.pictures, torch.tensor(200 / 255))
    assert len(corruption.messages) == 2
    with pytest.raises(ValueError, match="more than max_corrupt = 1"):
        load_holes(source, [0], [1], 32, ("box",), Corruption(1))


def test_scenes_are_endless_and_repeatable() -> None:
    source, again = SceneHoles(10, seed=1), SceneHoles(10, seed=1)
    assert source[3].prompt == again[3].prompt
    assert source[3].picture.tobytes() == again[3].picture.tobytes()
    assert source[3].picture.tobytes() != SceneHoles(10, seed=2)[3].picture.tobytes()
    assert open_inpainting("scenes-holes")[0].mask is None
    assert open_inpainting("scenes-objects")[0].mask is not None
    told = SceneHoles(4, prompts=["a small red circle on a dark background"], objects=True)
    assert told[2].prompt == "a small red circle on a dark background"
    mask = told[2].mask
    assert mask is not None
    pixels = np.array(told[2].picture).astype(int)
    red = pixels[..., 0] - pixels[..., 1] > 60
    assert mask[red].mean() > 0.9  # the object lies in the hole
    assert mask.mean() < 0.3
