"""The loop: what a run leaves behind, exact resume, gradients that are not finite, and signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.faults.kills import start
from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.cli import main
from diffusion_align.commands.train import run
from diffusion_align.data import PairBatch
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.engine.checkpoint import CheckpointError
from diffusion_align.training.engine.loop import TrainResult, run_loop
from diffusion_align.training.online.config import GRPOConfig, NFTConfig
from diffusion_align.training.online.preference.config import OnlineDPOConfig
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.policy.model import prepare_policy
from diffusion_align.training.run import train
from diffusion_align.training.scorers.config import RewardConfig
from diffusion_align.training.settings import load_config, save_config
from tests.brightness import Brightness
from tests.processes import TwoProcesses, lines, train_on_two_nodes


def build_config(model: Path, pairs: Path, folder: Path) -> DPOConfig:
    return DPOConfig(
        model=str(model), dataset=str(pairs), output_dir=str(folder / "run"), max_steps=4, logging_steps=1,
        per_device_train_batch_size=2, learning_rate=1e-3, beta=500.0, lora_rank=4, report_to="none", progress=False,
    )  # fmt: skip


@pytest.fixture
def config(sdxl_folder: Path, pairs_folder: Path, tmp_path: Path) -> DPOConfig:
    return build_config(sdxl_folder, pairs_folder, tmp_path)


@pytest.fixture(scope="module")
def plain(sdxl_folder: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run with these settings, which nothing may change."""
    return train(build_config(sdxl_folder, pairs_folder, tmp_path_factory.mktemp("plain")))


def weights(result: Any) -> dict[str, Tensor]:
    assert result.weights is not None
    return load_file(result.weights)


# -- what a run does -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_weights_settings_and_metrics(plain: TrainResult, config: DPOConfig) -> None:
    assert plain.weights == plain.output_dir / "pytorch_lora_weights.safetensors"
    again = load_config(DPOConfig, plain.output_dir / "config.yaml")
    assert again == replace(config, output_dir=str(plain.output_dir))
    assert [line["step"] for line in lines(plain.output_dir)] == [1, 2, 3, 4]
    assert {"loss", "implicit_accuracy", "error_chosen", "grad_norm", "learning_rate"} <= set(plain.history[0])


@pytest.mark.slow
def test_the_saved_settings_repeat_the_run(plain: TrainResult, tmp_path: Path) -> None:
    again = load_config(DPOConfig, plain.output_dir / "config.yaml")
    second = train(replace(again, output_dir=str(tmp_path / "again")))
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(second).values(), strict=True))


@pytest.mark.slow
def test_full_finetuning_leaves_the_reference_alone(config: DPOConfig) -> None:
    adapter = load_adapter(config.model)
    before = {name: p.clone() for name, p in adapter.unet.named_parameters()}
    result = train(replace(config, full_finetuning=True, learning_rate=1e-4), adapter)
    reference = adapter._reference_network
    assert reference is not None
    assert all(torch.equal(before[name], p) for name, p in reference.named_parameters())
    saved = UNet2DConditionModel.from_pretrained(result.weights)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), adapter.unet.parameters(), strict=True))
    assert not torch.equal(before["conv_in.weight"], adapter.unet.conv_in.weight)


@pytest.mark.slow
def test_accumulated_micro_batches_equal_one_batch(config: DPOConfig, tmp_path: Path) -> None:
    config = replace(config, learning_rate=1e-4, max_steps=2)
    whole = train(replace(config, per_device_train_batch_size=4))
    parts = train(replace(config, gradient_accumulation_steps=2, output_dir=str(tmp_path / "parts")))
    for a, b in zip(whole.history, parts.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_warmup_rises_to_the_learning_rate(config: DPOConfig) -> None:
    history = train(replace(config, warmup_steps=2, max_steps=3)).history
    assert [line["learning_rate"] for line in history] == pytest.approx([5e-4, 1e-3, 1e-3])


@pytest.mark.slow
def test_ema_weights_are_the_ones_saved(plain: TrainResult, config: DPOConfig, tmp_path: Path) -> None:
    last = weights(plain)
    averaged = weights(train(replace(config, use_ema=True, ema_decay=0.5, output_dir=str(tmp_path / "ema"))))
    name = next(name for name in last if "lora_B" in name or "lora.up" in name)
    assert not torch.equal(last[name], averaged[name])
    assert averaged[name].norm() < last[name].norm()
    checkpoint = tmp_path / "ema" / "checkpoint-00000004"
    assert all(
        torch.equal(t, averaged[n]) for n, t in load_file(checkpoint / "pytorch_lora_weights.safetensors").items()
    )
    raw = load_file(checkpoint / "policy.safetensors")
    assert any(torch.equal(t, last[name]) for t in raw.values())


@pytest.mark.slow
def test_cached_latents_train_like_encoded_ones(plain: TrainResult, config: DPOConfig, tmp_path: Path) -> None:
    cached = train(replace(config, cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "cached")))
    for a, b in zip(plain.history, cached.history, strict=True):
        assert a["error_chosen"] == pytest.approx(b["error_chosen"], rel=2e-3)
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-2)


@pytest.mark.slow
def test_streamed_pairs_train(config: DPOConfig) -> None:
    streamed = replace(config, streaming=True, max_steps=1)
    with pytest.raises(ValueError, match="aspect_ratio_buckets need a data set with random access"):
        train(replace(streamed, aspect_ratio_buckets=True))
    assert train(streamed).step == 1


@pytest.mark.slow
def test_inpo_trains_and_reads_its_own_settings(config: DPOConfig, tmp_path: Path) -> None:
    values = {**vars(config), "max_steps": 1}
    result = train(InPOConfig(**values, inversion_steps=3, renoise_iterations=1))
    assert result.step == 1
    assert result.history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    for own in ({"inversion_steps": 1, "renoise_iterations": 1}, {"inversion_steps": 3}):
        other = train(InPOConfig(**{**values, "output_dir": str(tmp_path / str(own))}, **own))
        assert other.history[0]["error_chosen"] != result.history[0]["error_chosen"]


@pytest.mark.slow
def test_validation_compares_with_the_base(config: DPOConfig) -> None:
    few: dict[str, Any] = {"max_steps": 2, "num_validation_prompts": 2, "validation_inference_steps": 2}
    result = train(replace(config, eval_steps=1, validation_scorer="scenes-oracle", **few))
    evaluations = [line for line in result.history if "eval/win_rate" in line]
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    assert evaluations[0]["eval/win_rate"] == 0.5
    assert (Path(config.output_dir) / "samples" / "step-000002.png").is_file()


@pytest.mark.slow
def test_an_earlier_run_is_never_mixed_with_a_new_one(config: DPOConfig) -> None:
    config = replace(config, max_steps=1)
    train(config)
    with pytest.raises(CheckpointError, match="holds checkpoint-00000001 of an earlier run: pass --resume-from"):
        train(config)
    assert train(replace(config, overwrite_output_dir=True)).step == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 66}, "resolution = 66 is not divisible by the VAE factor 4"),
        ({"model": "/nowhere/model"}, "model '/nowhere/model' not found"),
        ({"lora_target_modules": ("to_z",)}, r"lora_target_modules \['to_z'\] match no module"),
        ({"loss_type": "sigmiod"}, "loss_type = 'sigmiod' is wrong"),
        ({"dataset": "nothing.parquet"}, "data set 'nothing.parquet' not found"),
        ({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint latest: no whole checkpoint"),
        ({"eval_steps": 1, "validation_scorer": "clipp"}, "unknown scorer 'clipp'"),
    ],
)
def test_bad_settings_are_one_error_before_any_step(changes: dict[str, Any], message: str, config: DPOConfig) -> None:
    with pytest.raises((ValueError, FileNotFoundError, CheckpointError), match=message):
        train(replace(config, **changes))


def test_what_a_method_has_no_use_for_is_refused(config: DPOConfig) -> None:
    with pytest.raises(ValueError, match="scorer: method dpo learns from no scorer, but one was given"):
        train(config, scorer=Brightness())
    with pytest.raises(ValueError, match="adapter: method reward trains a scorer, but a diffusion model was given"):
        train(RewardConfig(output_dir=config.output_dir), load_adapter(config.model))


# -- dying and going on ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_and_resume_is_bit_for_bit_one_run(config: DPOConfig, tmp_path: Path) -> None:
    """8 steps against 4, kill -9, 4 more; dropout, EMA and a decaying learning rate have state to lose."""
    config = replace(
        config, max_steps=8, save_steps=4, lora_dropout=0.1, use_ema=True, lr_scheduler_type="cosine", warmup_steps=3
    )
    straight = train(config)
    killed = replace(config, output_dir=str(tmp_path / "killed"))
    save_config(killed, tmp_path / "recipe.yaml")
    process = start(["train", "dpo", "--config", str(tmp_path / "recipe.yaml")], tmp_path)
    while not (tmp_path / "killed" / "checkpoint-00000004").exists():
        assert os.waitpid(process, os.WNOHANG) == (0, 0), (tmp_path / "log").read_text()
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    resumed = train(replace(killed, resume_from_checkpoint="latest"))
    same = ("step", "loss", "grad_norm", "learning_rate")
    assert [[line[k] for k in same] for line in lines(killed.output_dir)] == [
        [line[k] for k in same] for line in straight.history
    ]
    for name, expected in weights(straight).items():
        assert torch.equal(expected, weights(resumed)[name]), name


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_says_how_to_go_on(
    config: DPOConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, max_steps=2000, save_steps=2000)
    save_config(config, tmp_path / "recipe.yaml")
    usual = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        while not (Path(config.output_dir) / "metrics.jsonl").exists() or not lines(config.output_dir):
            time.sleep(0.02)
        if signal.getsignal(signal.SIGTERM) is not usual:  # else it would end the tests
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert main(["train", "dpo", "--config", str(tmp_path / "recipe.yaml")]) == 130
    output = capsys.readouterr().out
    assert "stopped by SIGTERM" in output
    assert "--resume-from-checkpoint latest" in output
    assert len(list(Path(config.output_dir).glob("checkpoint-*"))) == 1
    assert signal.getsignal(signal.SIGTERM) is usual


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "fused", "nft", "online-dpo"])
def test_two_processes_draw_and_learn_as_one(
    name: str, sdxl_folder: Path, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    """Pictures, rewards, the spread of advantages and losses are those of all processes together."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue squares\na green star\na yellow triangle")
    shared: dict[str, Any] = {
        "model": str(sdxl_folder), "dataset": str(prompts), "num_inference_steps": 2, "guidance_scale": 2.0,
        "num_generations": 2, "max_steps": 2, "lora_rank": 4, "learning_rate": 1e-4, "logging_steps": 1,
        "report_to": "none", "progress": False,
    }  # fmt: skip
    fused = {"train_steps": 2, "fused_rollouts": True, "gradient_accumulation_steps": 2, "kl_beta": 0.1}
    methods: dict[str, tuple[type[TrainConfig], dict[str, Any]]] = {
        "grpo": (GRPOConfig, {"train_steps": 2}),
        "fused": (GRPOConfig, fused),
        "nft": (NFTConfig, {"updates_per_picture": 2}),
        "online-dpo": (OnlineDPOConfig, {"updates_per_picture": 4, "reference": "ema", "beta": 50.0}),
    }
    method, items = methods[name]
    build: Callable[..., TrainConfig] = partial(method, **shared, **items)
    one = train(build(output_dir=str(tmp_path / "one"), prompts_per_rollout=4, per_device_train_batch_size=16))
    two = build(output_dir=str(tmp_path / "two"), prompts_per_rollout=2, per_device_train_batch_size=8)
    for a, b in zip(one.history, two_processes.train(two), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], abs=5e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_two_nodes_train_as_one(config: DPOConfig, tmp_path: Path) -> None:
    config = replace(config, learning_rate=1e-4, max_steps=2)
    one = train(replace(config, per_device_train_batch_size=4))
    two = replace(config, output_dir=str(tmp_path / "two"))
    for a, b in zip(one.history, train_on_two_nodes(two, tmp_path / "recipe.yaml"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["error_chosen"] == pytest.approx(b["error_chosen"], rel=1e-4)


@pytest.mark.slow
def test_early_stopping_is_an_end_without_an_error(config: DPOConfig, capsys: pytest.CaptureFixture[str]) -> None:
    patient: dict[str, Any] = {"eval_steps": 1, "early_stopping_patience": 1, "validation_scorer": "scenes-oracle"}
    few: dict[str, Any] = {"num_validation_prompts": 1, "validation_inference_steps": 1}
    assert run(replace(config, learning_rate=1e-30, **patient, **few)) == 0
    assert "trained 1 steps (early stopping; the best weights are in" in capsys.readouterr().out


class Scripted:
    """A method whose loss is not finite at chosen steps."""

    def __init__(self, adapter: Adapter, bad: set[int]) -> None:
        self.parameter = next(iter(adapter.trainable_parameters().values()))
        self.bad, self.step = bad, 0

    def batches(self) -> Iterator[Any]:
        while True:
            self.step += 1
            seeds, one = torch.tensor([self.step]), torch.ones(1)
            yield PairBatch([""], torch.zeros(2, 1, 6), one, one, seeds, [f"row {self.step}"])

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        factor = float("nan") if self.step in self.bad else 1.0
        loss = (self.parameter.square().sum() + 1) * factor
        return loss, {"loss": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It has none."""


def scripted(config: DPOConfig, bad: set[int]) -> tuple[Adapter, Any]:
    adapter = load_adapter(config.model)
    prepare_policy(config, adapter)
    return adapter, lambda: run_loop(config, adapter, Scripted(adapter, bad), build_accelerator(config))


def test_steps_that_are_not_finite_are_skipped_and_counted(config: DPOConfig) -> None:
    adapter, run = scripted(replace(config, max_steps=8), bad={2, 3, 5})
    result = run()
    assert [line["skipped_steps"] for line in result.history] == [0, 1, 2, 2, 3, 3, 3, 3]
    assert all(torch.isfinite(p).all() for p in adapter.trainable_parameters().values())


def test_three_bad_steps_in_a_row_stop_the_run_and_keep_the_batch(config: DPOConfig) -> None:
    _, run = scripted(replace(config, max_steps=8), bad={2, 3, 4})
    with pytest.raises(
        FloatingPointError, match="not finite for 3 optimiser steps in a row; the last batch is saved in"
    ):
        run()
    saved = load_file(Path(config.output_dir) / "bad_batch_rank0.safetensors")
    assert saved["seeds"].tolist() == [4]


@pytest.mark.slow
def test_the_weights_of_the_best_validation_are_kept(config: DPOConfig) -> None:
    """Also of a run that does not stop early; one without a score has no best."""
    config = replace(config, max_steps=2, eval_steps=1, save_steps=1)
    adapter, values = load_adapter(config.model), iter([0.1, 0.5, 0.4])
    prepare_policy(config, adapter)

    def run(folder: str, name: str) -> Path:
        output = replace(config, output_dir=str(Path(config.output_dir) / folder))
        method = Scripted(adapter, set())
        run_loop(output, adapter, method, build_accelerator(output), lambda step: {name: next(values)})
        return Path(output.output_dir)

    folder = run("scored", "eval/reward")
    best, after, last = (
        load_file(folder / place / "pytorch_lora_weights.safetensors") for place in ("best", "checkpoint-00000001", "")
    )
    assert all(torch.equal(best[name], after[name]) for name in after)
    assert not all(torch.equal(best[name], last[name]) for name in last)
    values = iter([0.1, 0.5, 0.4])
    assert not (run("pictures", "eval/other") / "best").exists()
