"""Checkpoints: atomic, verified, and exact for optimisers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion_align.training.engine.checkpoint import (
    CheckpointError,
    TrainState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    optimizer_to_state,
    save_checkpoint,
    state_to_optimizer,
)
from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.engine.optimizer import build_optimizer


@pytest.fixture
def state() -> TrainState:
    return TrainState({"policy": {"w": torch.arange(6.0).view(2, 3)}}, {"step": 3, "data": {"epoch": 1}})


def test_state_reads_back_equal(state: TrainState, tmp_path: Path) -> None:
    found = load_checkpoint(save_checkpoint(tmp_path, state, 3, keep=2))
    assert torch.equal(found.tensors["policy"]["w"], state.tensors["policy"]["w"])
    assert found.values == state.values


def test_only_the_newest_are_kept(state: TrainState, tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, state, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000009", "checkpoint-00000010"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "policy.safetensors").write_bytes(b"short"), "has 5 bytes, expected"),
        (lambda c: (c / "policy.safetensors").unlink(), "policy.safetensors is missing"),
        (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda c: flip_last_byte(c / "policy.safetensors"), "does not match its checksum"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(damage, message, state, tmp_path) -> None:  # type: ignore[no-untyped-def]
    good = save_checkpoint(tmp_path, state, 1, keep=5)
    torn = save_checkpoint(tmp_path, state, 2, keep=5)
    damage(torn)
    found, passed = find_checkpoint("latest", tmp_path)
    assert found == good
    assert message in passed[0]
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(str(torn), tmp_path)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_an_unfinished_write_is_never_found(state: TrainState, tmp_path: Path) -> None:
    final = save_checkpoint(tmp_path, state, 5, keep=2)
    shutil.move(final, tmp_path / f".{final.name}.partial")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        find_checkpoint("latest", tmp_path)


def test_weights_for_others_are_checked_and_are_no_state(state: TrainState, tmp_path: Path) -> None:
    def save_weights(folder: Path) -> None:
        (folder / "unet").mkdir()
        for name in ("lora.safetensors", "unet/model.safetensors"):
            save_file({"x": torch.ones(1)}, folder / name)

    whole = save_checkpoint(tmp_path, state, 1, keep=5, save_weights=save_weights)
    assert load_checkpoint(whole).tensors.keys() == state.tensors.keys()
    assert {path.stat().st_mode & 0o777 for path in whole.rglob("*") if path.is_file()} == {0o644}
    torn = save_checkpoint(tmp_path, state, 2, keep=5, save_weights=save_weights)
    flip_last_byte(torn / "unet" / "model.safetensors")
    found, passed = find_checkpoint("latest", tmp_path)
    assert found == whole
    assert "unet/model.safetensors does not match its checksum" in passed[0]


def test_a_checkpoint_of_0_1_is_read(state: TrainState, tmp_path: Path) -> None:
    """Its manifest does not say which files are state: all are."""
    folder = save_checkpoint(tmp_path, state, 1, keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["state"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert load_checkpoint(folder).tensors.keys() == state.tensors.keys()


def build(optim: str) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    return layer, build_optimizer(RunConfig(optim=optim, learning_rate=0.1), list(layer.parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adafactor_scaled"])
def test_an_optimiser_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, i: int) -> None:
        optimizer.zero_grad()
        layer(torch.full((2, 4), float(i))).square().sum().backward()
        optimizer.step()

    straight, optimizer = build(kind)
    for i in range(4):
        step(straight, optimizer, i)
        if i == 1:
            tensors, values = optimizer_to_state(optimizer)
            weights = {k: v.clone() for k, v in straight.state_dict().items()}
            folder = save_checkpoint(tmp_path, TrainState({"optimizer": tensors, "policy": weights}, values), 2, keep=1)
    resumed, optimizer = build(kind)
    found = load_checkpoint(folder)
    resumed.load_state_dict(found.tensors["policy"])
    state_to_optimizer(optimizer, found.tensors["optimizer"], found.values)
    for i in (2, 3):
        step(resumed, optimizer, i)
    assert torch.equal(straight.weight, resumed.weight)


@pytest.mark.parametrize("saved", ["adamw", "adafactor", "adafactor_scaled"])
@pytest.mark.parametrize("own", ["adamw", "adafactor", "adafactor_scaled"])
def test_another_optimiser_s_state_is_one_clear_error(saved: str, own: str) -> None:
    layer, optimizer = build(saved)
    layer(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    state = optimizer_to_state(optimizer)
    if saved == own:
        state_to_optimizer(build(own)[1], *state)
        return
    with pytest.raises(CheckpointError, match=rf"optimiser is {saved}, this run's is {own}: set optim to {saved} "):
        state_to_optimizer(build(own)[1], *state)
