"""What pairs are watched for: by timestep, and by the gradients of both errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_align.objectives.list_stats import ListStats
from diffusion_align.objectives.pair_stats import PairStats
from diffusion_align.process import VariancePreserving
from diffusion_align.process.outputs import OUTPUTS
from diffusion_align.process.path import scaled_linear
from diffusion_align.training.engine.metrics import WeightedMean
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.policy.watching.divergence import step_divergence
from diffusion_align.training.policy.watching.entanglement import EntanglementProbe, entanglement
from diffusion_align.training.policy.watching.pair_watch import PairWatch
from diffusion_align.training.policy.watching.timestep_bins import TimestepBins
from diffusion_align.training.run import train

PATH = VariancePreserving(scaled_linear().float(), OUTPUTS["epsilon"])


def means(found: Tensor | WeightedMean) -> list[float]:
    assert isinstance(found, WeightedMean)
    return (found.total / found.weight).tolist()


def test_pairs_by_timestep_are_sorted_by_hand() -> None:
    t = torch.tensor([100, 900, 800])
    stats = PairStats(
        torch.tensor([0.2, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.2]), torch.tensor([0.3, 0.3, 0.5]),
        torch.tensor([0.1, 0.3, 0.5]), torch.full((2, 3), 1e-3), torch.tensor([0.1, 0.8, 0.3]),
    )  # fmt: skip
    found = PairWatch(PATH, TimestepBins(2, 1000))(t, stats, 10.0, 48)
    assert means(found["chosen_error_up/"]) == [0.0, 0.5]
    assert means(found["reward_chosen/"]) == pytest.approx([5 * 0.1, 5 * (-0.1 + 0.2) / 2])
    assert means(found["reward_rejected/"]) == pytest.approx([5 * -0.1, 5 * (0.1 + 0.3) / 2])
    assert means(found["kappa/"]) == pytest.approx([0.5, 1.5])
    assert found["kappa_above_1"] == pytest.approx(1 / 3)
    first, second, third = step_divergence(PATH, torch.full((3,), 0.048), t).tolist()
    assert means(found["kl_data/"]) == pytest.approx([first, (second + third) / 2])
    bare = PairWatch(PATH, TimestepBins(2, 1000))(t, PairStats(stats.chosen, stats.rejected), 10.0, 48)
    assert bare == {}


def test_lists_by_timestep_are_sorted_by_hand() -> None:
    """The second list has two best pictures, and a place without a picture, whose numbers must not count."""
    t = torch.tensor([100, 900])
    stats = ListStats(
        torch.tensor([[0.5, 0.2, 0.3], [0.4, 0.1, 9.0]]), torch.tensor([[0.3, 0.2, 0.5], [0.2, 0.2, 1.0]]),
        torch.tensor([[True, True, True], [True, True, False]]), torch.tensor([[2e-3, 1e-3, 0.0], [1e-3, 3e-3, 9.0]]),
    )  # fmt: skip
    rank = torch.tensor([[2, 0, 1], [0, 0, 0]])
    found = PairWatch(PATH, TimestepBins(2, 1000)).of_lists(t, stats, rank, 10.0, 48)
    assert means(found["chosen_error_up/"]) == [0.0, 0.5]
    assert means(found["reward_chosen/"]) == pytest.approx([0.0, 5 * (-0.2 + 0.1) / 2], abs=1e-6)
    assert means(found["reward_rejected/"]) == pytest.approx([5 * -0.2, 5 * (-0.2 + 0.1) / 2])
    assert means(found["kl_data/"]) == pytest.approx(step_divergence(PATH, 48 * torch.tensor([1e-3, 2e-3]), t).tolist())


def test_labelled_pictures_by_timestep_are_sorted_by_hand() -> None:
    t = torch.tensor([100, 200, 300, 900])
    stats = ListStats(
        torch.tensor([[0.5], [0.2], [0.3], [0.4]]), torch.tensor([[0.3], [0.3], [0.2], [0.2]]),
        moved=torch.tensor([[1e-3], [2e-3], [3e-3], [4e-3]]),
    )  # fmt: skip
    label = torch.tensor([1, 1, -1, -1])
    found = PairWatch(PATH, TimestepBins(2, 1000)).of_labelled(t, stats, label, 10.0, 48)
    assert found["chosen_error_up/"].weight.tolist() == [2, 0]  # type: ignore[union-attr]
    assert found["chosen_error_up/"].total.tolist() == [1, 0]  # type: ignore[union-attr]
    assert found["reward_chosen/"].total.tolist() == pytest.approx([5 * (-0.2 + 0.1), 0])  # type: ignore[union-attr]
    assert means(found["reward_rejected/"]) == pytest.approx([5 * -0.1, 5 * -0.2])
    each = step_divergence(PATH, 48 * torch.tensor([1e-3, 2e-3, 3e-3, 4e-3]), t)
    assert means(found["kl_data/"]) == pytest.approx([each[:3].mean().item(), each[3].item()])


def test_entanglement_tells_where_the_errors_go() -> None:
    """One step along -(g_w - g_l) of two quadratic errors, against what kappa says."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        chosen, rejected = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        rejected = chosen * torch.rand((), generator=generator) * 3 + 0.5 * rejected
        found = entanglement(chosen, rejected)
        step = -1e-6 * (chosen - rejected)
        assert bool(chosen @ step > 0) == bool(found["kappa"] > 1)
        assert bool(rejected @ step < 0) == bool(found["kappa_rejected"] > 1)
        assert found["cosine"].item() == pytest.approx(torch.cosine_similarity(chosen, rejected, dim=0).item())


def test_gradients_are_taken_now_and_then_and_leave_the_loss_as_it_was() -> None:
    torch.manual_seed(0)
    network, unused = nn.Linear(3, 2), nn.Parameter(torch.zeros(2))
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    by_hand = []
    for side in range(2):
        network.zero_grad()
        (network(x[side]) - y[side]).square().mean(dim=1).mean().backward()
        by_hand.append(torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None]))
    expected = entanglement(*by_hand)
    probe = EntanglementProbe(lambda: [*network.parameters(), unused], every=2)
    taken = []
    for _ in range(4):
        network.zero_grad()
        chosen, rejected = ((network(x[side]) - y[side]).square().mean(dim=1) for side in range(2))
        found = probe(chosen, rejected)
        taken.append(sorted(found))
        (chosen.mean() - rejected.mean()).backward()
        grad = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        assert torch.allclose(grad.double(), by_hand[0] - by_hand[1], atol=1e-6)
        for name, value in found.items():
            assert isinstance(value, WeightedMean)
            assert value.total.item() == pytest.approx(expected[name.partition("/")[2]].item(), rel=1e-4)
    names = ["entanglement/cosine", "entanglement/kappa", "entanglement/kappa_rejected"]
    assert taken == [names, [], names, []]
    again = EntanglementProbe(lambda: [*network.parameters()], every=2)
    again.load_state_dict({**probe.state_dict(), "entanglement_calls": 3})
    assert again(network(x[0]).square().mean(dim=1), network(x[1]).square().mean(dim=1)) == {}
    again.load_state_dict({})
    assert again.calls == 0
    assert EntanglementProbe(list, every=0).state_dict() == {}


@pytest.mark.slow
def test_a_watched_run_learns_the_same(sd_folder: Path, pairs_folder: Path, tmp_path: Path) -> None:
    config = DPOConfig(
        model=str(sd_folder), dataset=str(pairs_folder), output_dir=str(tmp_path / "plain"), max_steps=3, lora_rank=2,
        learning_rate=1e-3, logging_steps=1, save_steps=2, report_to="none", progress=False, timestep_bins=0,
    )  # fmt: skip
    plain = train(config)
    watched = train(replace(config, output_dir=str(tmp_path / "watched"), timestep_bins=2, entanglement_steps=2))
    weights = [load_file(run.output_dir / "pytorch_lora_weights.safetensors") for run in (plain, watched)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert ["entanglement/kappa" in line for line in watched.history] == [True, False, True]
    assert all(any(name.startswith("kl_data/t") for name in line) for line in watched.history)
    assert all({"kappa_above_1", "chosen_error_up"} <= line.keys() for line in watched.history)
    assert not any("/t" in name for line in plain.history for name in line)
    (watched.output_dir / "checkpoint-00000003" / "manifest.json").unlink()
    resumed = train(
        replace(config, output_dir=str(tmp_path / "watched"), timestep_bins=2, entanglement_steps=2,
                resume_from_checkpoint="latest")
    )  # fmt: skip
    last, timed = watched.history[-1], "samples_per_second"
    assert {**resumed.history[-1], timed: 0} == {**last, timed: 0}
    assert json.loads((watched.output_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
