"""Nesterov's step between rounds, against straight lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.adapters.lora_files import LowRank
from diffusion_align.training.online.preference.momentum import LoraMomentum, build_momentum, compressed


def dense(adapter: Adapter) -> dict[str, Tensor]:
    """What the LoRAs add to each weight."""
    added = adapter.loras.attached()
    return {a.module: (layer.up.flatten(1) @ layer.down.flatten(1)).double() for a, layer in added.items()}


def learn(adapter: Adapter, seed: int) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(adapter.trainable_parameters().values()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + i))


@pytest.mark.slow
def test_a_lora_goes_on_as_what_it_adds_does(sd_folder: Path, tmp_path: Path) -> None:
    """Over three rounds, with convolutions: w <- w + alpha (w - w_before) of the dense sums."""
    adapter = load_adapter(sd_folder)
    adapter.train_lora(3, alpha=6, targets=["to_q", "conv1"])
    momentum = build_momentum(adapter, 0.4)
    assert isinstance(momentum, LoraMomentum)
    names = list(adapter.trainable_parameters())
    before = {name: torch.zeros_like(added) for name, added in dense(adapter).items()}
    for number in range(3):
        learn(adapter, number)
        now = dense(adapter)
        momentum.extrapolate()
        found = dense(adapter)
        for name, added in now.items():
            expected = added + 0.4 * (added - before[name])
            assert torch.allclose(found[name], expected, atol=1e-5 * float(expected.abs().max()))
        before = now
        assert list(adapter.trainable_parameters()) == names
    x, t, cond = torch.ones(1, 4, 16, 16), torch.tensor([300]), adapter.encode_prompts(["a red circle"])
    with torch.no_grad():
        policy = adapter.predict(x, t, cond).output
        with adapter.reference():
            base = adapter.predict(x, t, cond).output
    saved = load_adapter(sd_folder).load_weights(adapter.save(tmp_path))
    fresh = load_adapter(sd_folder)
    with torch.no_grad():
        assert torch.allclose(saved.predict(x, t, cond).output, policy, atol=1e-4)
        assert torch.equal(fresh.predict(x, t, cond).output, base)
        assert (policy - base).abs().max() > 1e-3

    # In another process, from a checkpoint: the trained matrices come first, then the method's state.
    other = load_adapter(sd_folder)
    other.train_lora(3, alpha=6, targets=["to_q", "conv1"])
    with torch.no_grad():
        for name, parameter in other.trainable_parameters().items():
            parameter.copy_(adapter.trainable_parameters()[name])
    resumed = build_momentum(other, 0.4)
    resumed.load_state_dict(momentum.state_dict())
    with torch.no_grad():
        assert torch.equal(other.predict(x, t, cond).output, policy)


def test_all_weights_go_on_each_for_itself(sd_folder: Path) -> None:
    adapter = load_adapter(sd_folder)
    adapter.train_full()
    momentum = build_momentum(adapter, 0.3)
    before = {name: p.detach().clone() for name, p in adapter.trainable_parameters().items()}
    for number in range(2):
        learn(adapter, number)
        now = {name: p.detach().clone() for name, p in adapter.trainable_parameters().items()}
        momentum.extrapolate()
        for name, parameter in adapter.trainable_parameters().items():
            assert torch.allclose(parameter, 1.3 * now[name] - 0.3 * before[name], atol=1e-5)
        before = now


def test_a_sum_is_held_in_as_few_ranks_as_it_has() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 8, 3, 3, generator=generator), torch.randn(6, 3, 1, 1, generator=generator)
    whole = LowRank(torch.cat([down, 2 * down, -down]), torch.cat([up, up, up], dim=1))
    found = compressed(whole)
    assert (found.rank, found.up.shape, found.down.shape) == (3, (6, 3, 1, 1), (3, 8, 3, 3))
    assert torch.allclose(found.up.flatten(1) @ found.down.flatten(1), 2 * up.flatten(1) @ down.flatten(1), atol=1e-5)
