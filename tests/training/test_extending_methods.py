"""An online method more: a file for its settings, a file for its loss, and a line in the table."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from diffusion_align.cli import main, parse
from diffusion_align.training import methods
from diffusion_align.training.methods import Addresses, config_class
from diffusion_align.training.run import train
from tests.brightness import Brightness

CONFIG = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_align.training.engine.config import PositiveFloat
from diffusion_align.training.online.config import RolloutConfig


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RolloutConfig):
    """Reward-weighted regression: pictures are denoised, good ones more."""

    method: ClassVar[str] = "toy"

    temperature: PositiveFloat = 1.0
    """Of the weights exp(advantage / temperature)."""
'''
METHOD = """
from __future__ import annotations

from diffusion_align.objectives.errors import mse_per_sample
from diffusion_align.training.online.job import rollout_job
from diffusion_align.training.online.renoising import RenoisedBatch
from diffusion_align.training.online.rollout import RolloutStream
from diffusion_align.training.policy.guided import GuidedPolicy


class ToyMethod:
    def __init__(self, config, adapter, engine, accelerator):
        self.config, self.adapter, self.engine, self.accelerator = config, adapter, engine, accelerator
        self.policy = GuidedPolicy(adapter, engine.tasks.size, scale=1.0)
        self.stream = RolloutStream(
            engine.draw, 1, config.per_device_train_batch_size, config.gradient_accumulation_steps, config.seed
        )

    def batches(self):
        return iter(self.stream)

    def loss(self, batch):
        noisy = RenoisedBatch(self.adapter, batch, self.config)
        conditions = self.policy.conditions(batch.rollout.prompts, noisy.inpaint)
        output = self.policy.predict(noisy.x_t, noisy.t, conditions).output
        weights = (batch.rollout.advantage / self.config.temperature).exp()
        loss = (weights * mse_per_sample(output, noisy.target)).mean()
        return loss, {"loss": loss.detach(), "reward": batch.rollout.reward.mean()}

    def state_dict(self):
        return {**self.stream.state_dict(self.accelerator), **self.engine.state_dict()}

    def load_state_dict(self, state):
        self.stream.load_state_dict(state, self.accelerator)
        self.engine.load_state_dict(state)


def toy_job(config, accelerator, adapter, scorer):
    return rollout_job(config, accelerator, adapter, scorer, ToyMethod)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_config.py").write_text(CONFIG)
    (tmp_path / "toy_method.py").write_text(METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    line = {"toy": Addresses("toy_config:ToyConfig", "toy_method:toy_job")}
    monkeypatch.setattr(methods, "METHODS", MappingProxyType({**methods.METHODS, **line}))


@pytest.fixture
def settings(sdxl_folder: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.txt").write_text("a red circle\na green star")
    return {
        "model": str(sdxl_folder), "dataset": str(tmp_path / "prompts.txt"), "output_dir": str(tmp_path / "run"),
        "num_inference_steps": 2, "guidance_scale": 1.0, "num_generations": 2, "prompts_per_rollout": 2,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 1, "logging_steps": 1,
        "report_to": "none", "progress": False,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_a_new_method_trains_resumes_and_reports(settings: dict[str, Any], tmp_path: Path) -> None:
    cls = config_class("toy")
    first = train(cls(**settings, max_steps=1), scorer=Brightness())
    second = train(cls(**settings, max_steps=2, resume_from_checkpoint="latest"), scorer=Brightness())
    assert (first.step, second.step) == (1, 2)
    assert torch.isfinite(torch.tensor([line["loss"] for line in first.history + second.history])).all()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "toy: run" in page
    assert "Reward: " in page


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_a_new_method_is_on_the_command_line(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(["train", "toy", "--temperature", "2"])[1]
    assert (config.method, config.temperature) == ("toy", 2.0)
    with pytest.raises(SystemExit):
        parse(["train", "--help"])
    assert "toy         Reward-weighted regression" in capsys.readouterr().out
    assert main(["train", "toy", "--model", settings["model"], "--dry-run"]) == 0
    assert "32 a rollout, 1 an optimiser step" in capsys.readouterr().out


@pytest.mark.usefixtures("toy")
def test_a_new_method_is_checked_like_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy", "--per-device-train-batch-size", "3"]) == 2
    assert "a rollout has 32 training items, an optimiser step takes 3" in capsys.readouterr().err


def test_a_method_that_is_in_no_table_is_told() -> None:
    with pytest.raises(ValueError, match="method = 'toy': expected one of dpo, inpo, "):
        config_class("toy")
