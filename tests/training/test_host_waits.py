"""What a GPU run lives on: the host never waits for the device within a step. Seen on a device without values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffusion_align.adapters import load_adapter
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.judges.evaluator import EvaluatorSettings, LatentEvaluator
from diffusion_align.rewards import Ensemble, RewardOutput, RewardScorer
from diffusion_align.sampling.sampler import sample
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.engine.guard import FiniteGuard
from diffusion_align.training.engine.loop import run_loop
from diffusion_align.training.methods import build_job
from diffusion_align.training.online.config import GRPOConfig, NFTConfig
from diffusion_align.training.online.gradients.config import DRaFTConfig
from diffusion_align.training.pairs import loading as source
from diffusion_align.training.pairs import remembering
from diffusion_align.training.pairs.beyond_pairs.config import KTOConfig
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig
from diffusion_align.training.policy.costs.live_bytes import RememberedShapes
from tests.device_traffic import Traffic


class Brightness(RewardScorer):
    """Differentiable, on the device of its one weight."""

    differentiable = True

    def __init__(self, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device=device), requires_grad=False)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        return RewardOutput((images * self.weight).flatten(1).mean(dim=1))


class FusedSGD(torch.optim.SGD):
    """Takes the verdict as a device tensor, as torch's fused optimisers do on devices that have them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1, foreach=False)
        self.defaults["fused"] = True

    def step(self, closure: Any = None) -> None:
        self.found_inf: Tensor | None = None
        super().step(closure)


class Enough(Exception):
    """The loop is left before it writes weights that have no values."""


class Short:
    """A method whose batches end after ``steps``."""

    def __init__(self, method: Any, steps: int) -> None:
        self.method, self.steps, self.loss = method, steps, method.loss

    def batches(self) -> Iterator[Any]:
        yield from islice(self.method.batches(), self.steps)
        raise Enough


#: All runs ask torch's rules for shapes the same questions.
SHAPES = RememberedShapes()


@pytest.fixture
def device() -> Iterator[None]:
    """Runs are on ``meta``."""
    yield
    PartialState._reset_state()


def waits(config: RunConfig, model: Path) -> list[str]:
    """Where a run of ``config`` waited."""
    config, steps = replace(config, max_steps=1000, save_steps=1000), config.max_steps
    if hasattr(config, "scorer_timeout"):
        config = replace(config, scorer_timeout=0)  # no thread of its own: a dispatch mode sees its own thread only
    accelerator = build_accelerator(config)
    PartialState._shared_state["device"] = accelerator.state.device = torch.device("meta")
    adapter, real = load_adapter(model), load_adapter(model)
    opened = source.open_or_build_cache
    with pytest.MonkeyPatch.context() as patch:  # a cache is made, and its mark compared, with weights that have values
        patch.setattr(
            source, "open_or_build_cache", lambda c, a, transform, is_main: opened(c, real, transform, is_main)
        )
        patch.setattr(remembering, "facts", lambda *_: {})
        reward = Brightness("meta" if isinstance(config, DRaFTConfig) else "cpu")
        job = build_job(config, accelerator, adapter.to("meta"), reward)
    adapter.unet.to("meta")  # peft makes LoRA weights on the CPU
    optimizer, short = FusedSGD(list(job.trained.trainable_parameters().values())), Short(job.method, steps)
    with SHAPES, Traffic() as traffic, pytest.raises(Enough):
        run_loop(config, job.trained, short, accelerator, bare_optimizer=optimizer)  # type: ignore[arg-type]
    return traffic.waits


@pytest.fixture
def settings(pairs_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "dataset": str(pairs_folder),
        "output_dir": str(tmp_path / "run"),
        "progress": False,
        "report_to": "none",
        "logging_steps": 1000,
        "per_device_train_batch_size": 2,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (DPOConfig, {}),
        (DPOConfig, {"noise_draws": 1, "reference_cache": True, "max_pairs": 4}),  # the second epoch finds all known
        (InPOConfig, {"inversion_steps": 2}),
        (
            DPOConfig,
            {
                "safeguard_mu": 0.5,
                "margin_dropout": 0.5,
                "swap_labels": True,
                "timestep_weight": "min-snr",
                "reference": "ema",
            },
        ),
        (KTOConfig, {}),
    ],
)
def test_a_cached_pair_step_waits_for_nothing(
    kind: Any, fields: dict[str, Any], settings: dict[str, Any], sdxl_folder: Path, tmp_path: Path, device: None
) -> None:
    config = kind(cache_dir=str(tmp_path / "cache"), max_steps=3, **settings, **fields)
    found = waits(config, sdxl_folder)
    assert all("metrics.py" in wait for wait in found), found  # the run's one log line


def test_soft_labels_are_sent_without_waiting(sdxl_folder: Path) -> None:
    batch = source.PairBatch(["a"], torch.zeros(2, 1, 6), torch.tensor([0.7]), torch.ones(1), torch.ones(1), ["k"])
    with Traffic() as traffic:
        batch.to("meta")
    assert traffic.waits == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields", "longer"),
    [
        (GRPOConfig, {"train_steps": 2}, [{"num_inference_steps": 3}, {"max_steps": 2}]),  # more sampling, or an update
        (
            GRPOConfig,
            {"train_steps": 2, "fused_rollouts": True, "per_device_train_batch_size": 8},
            [{"num_inference_steps": 3}],
        ),
        (NFTConfig, {}, [{"num_inference_steps": 3}]),
    ],
)
def test_a_longer_rollout_and_more_updates_of_it_wait_no_more_often(
    kind: Any,
    fields: dict[str, Any],
    longer: list[dict[str, Any]],
    settings: dict[str, Any],
    sdxl_folder: Path,
    device: None,
) -> None:
    config = kind(num_generations=2, prompts_per_rollout=2, max_steps=1, num_inference_steps=2, **settings | fields)
    expected = len(waits(config, sdxl_folder))
    for changes in longer:
        assert len(waits(replace(config, **changes), sdxl_folder)) == expected, changes


@pytest.mark.slow
def test_draft_waits_for_its_pictures_and_rewards_alone(
    settings: dict[str, Any], sdxl_folder: Path, device: None
) -> None:
    config = DRaFTConfig(num_inference_steps=2, max_steps=2, **settings)
    new_captions = ("sdxl.py", "conditioning.py")  # their tokens, and their rows, which are remembered on the host
    found = [wait for wait in waits(config, sdxl_folder) if not any(name in wait for name in new_captions)]
    checks = [wait for wait in found if "preprocess.py" in wait or "watched.py" in wait]
    assert len(checks) == 2 * 2
    assert all("metrics.py" in wait for wait in found if wait not in checks), found


@pytest.mark.slow
def test_dynamic_guidance_reads_its_choices_once_a_run(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder).to("meta")
    cond = adapter.encode_prompts(["a red star"])
    assert cond.pooled is not None
    shape = (adapter.latent_channels, adapter.unet.config.sample_size, cond.embeds.shape[-1], cond.pooled.shape[-1])
    judge = LatentEvaluator(EvaluatorSettings(*shape)).eval().to("meta")

    def count(steps: int) -> int:
        guider = DynamicGuidance(kinds=("alignment", "fidelity", "preference"))
        guider.use(judge)
        with Traffic() as traffic:
            sample(adapter, ["a red star"] * 2, num_inference_steps=steps, guidance=guider, seeds=[1, 2])
        return len(traffic.waits)

    assert count(2) == count(4)


def test_members_that_score_on_the_cpu_join_the_others_on_the_device() -> None:
    class OnCPU(Brightness):
        def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
            return RewardOutput(torch.zeros(len(images)))

    ensemble = Ensemble([Brightness("meta"), OnCPU("meta")], standardise="none")
    with Traffic():
        assert ensemble.score(torch.zeros(2, 3, 8, 8), ["a", "b"]).reward.is_meta


def test_three_bad_steps_still_stop_a_run_that_reads_late(tmp_path: Path, settings: dict[str, Any]) -> None:
    accelerator = build_accelerator(DPOConfig(**settings))
    optimizer = accelerator.prepare(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    guard = FiniteGuard(accelerator, optimizer, tmp_path)
    guard.waits, guard.read_every = False, 3
    for _ in range(5):
        guard.watch(torch.tensor(float("nan")), Brightness("cpu"))
        guard.step(torch.tensor(1.0))
    with pytest.raises(FloatingPointError, match="3 optimiser steps in a row"):
        guard.step(torch.tensor(1.0))


def test_the_reference_switch_walks_each_part_once_for_each_set_of_adapters(
    sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = load_adapter(sdxl_folder).train_lora(rank=2)
    adapter.save(tmp_path)

    def walks() -> int:
        count, walk = 0, nn.Module.modules

        def counted(module: nn.Module) -> Iterator[nn.Module]:
            nonlocal count
            count += 1
            return walk(module)

        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "modules", counted)
            for _ in range(3):
                with adapter.reference():
                    assert all(m._disable_adapters for m in walk(adapter.unet) if isinstance(m, BaseTunerLayer))
        return count

    parts = len(adapter.loras.parts)  # the UNet and both text encoders
    assert walks() == parts
    assert walks() == 0
    adapter.pipeline.unload_lora_weights()
    adapter.pipeline.load_lora_weights(tmp_path)
    assert walks() == parts
