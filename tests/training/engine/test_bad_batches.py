"""A batch whose loss is not finite is saved whole, whatever the method's batches are made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.engine.guard import leaves
from diffusion_align.training.engine.loop import run_loop
from diffusion_align.training.evaluators.config import EvaluatorConfig
from diffusion_align.training.methods import build_job
from diffusion_align.training.online.config import InpaintRLConfig
from diffusion_align.training.online.gradients.config import DRaFTConfig
from diffusion_align.training.online.preference.config import OnlineDPOConfig
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.scorers.config import RewardConfig
from tests.brightness import Brightness


class Diverging:
    """A method whose loss is never finite; remembers its batches."""

    def __init__(self, method: Any) -> None:
        self.method, self.seen = method, []

    def batches(self) -> Iterator[Any]:
        return iter(self.method.batches())

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(batch)
        loss, metrics = self.method.loss(batch)
        return loss * float("nan"), metrics

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It has none."""


ONLINE = {"num_inference_steps": 2, "guidance_scale": 1.0, "dataset": "scenes-holes", "per_device_train_batch_size": 4}
ROLLOUT = {"num_generations": 2, "prompts_per_rollout": 2, "train_steps": 2, "trust": "none", "rollout_batch_size": 4}
#: Settings, and what must be in the file: names of tensors, and of texts.
CASES: dict[str, tuple[type[RunConfig], dict[str, Any], set[str], set[str]]] = {
    "dpo": (DPOConfig, {}, {"pixels", "seeds", "preference"}, {"captions", "keys"}),
    "dpo-cached": (DPOConfig, {"cache_dir": "cache"}, {"posterior.0", "posterior.1", "cond.embeds"}, {"keys"}),
    "reward": (RewardConfig, {"scorer": "vp-score"}, {"images", "labels"}, {"prompts", "keys"}),
    "evaluator": (
        EvaluatorConfig,
        {"real_dataset": "PAIRS", "width": 8, "features": 16},
        {"generated.pairs.images", "generated.noise", "real.pairs.images", "real.t"},
        {"generated.pairs.keys", "real.pairs.keys"},
    ),
    "inpaint-rl": (
        InpaintRLConfig,
        {**ONLINE, **ROLLOUT},
        {"rollout.reward", "rollout.inpaint", "rollout.trajectory.before", "picture", "column"},
        {"rollout.prompts", "number"},
    ),
    "online-dpo": (
        OnlineDPOConfig,
        {**ONLINE, "num_generations": 2, "prompts_per_rollout": 2, "rollout_batch_size": 4, "updates_per_picture": 4},
        {"own.lists.reward", "own.lists.inpaint", "own.column"},
        {"own.lists.prompts", "own.number"},
    ),
    "draft": (DRaFTConfig, ONLINE, {"seeds", "holes.pictures", "holes.masks"}, {"prompts"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_last_bad_batch_is_saved(
    name: str, sdxl_folder: Path, inpaint_folder: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    cls, own, tensors, texts = CASES[name]
    common: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"), "dataset": str(pairs_folder), "max_steps": 8, "report_to": "none",
        "progress": False, "per_device_train_batch_size": 2,
    }  # fmt: skip
    if cls is not RewardConfig:
        common["model"] = str(inpaint_folder if "holes" in str(own) else sdxl_folder)
    paths = {"PAIRS": str(pairs_folder), "cache": str(tmp_path / "cache")}
    own = {key: paths.get(value, value) if isinstance(value, str) else value for key, value in own.items()}
    config = cls(**{**common, **own})
    accelerator = build_accelerator(config)
    job = build_job(config, accelerator, scorer=Brightness() if "holes" in str(own) else None)
    method = Diverging(job.method)
    with pytest.raises(FloatingPointError, match="not finite for 3 optimiser steps in a row; the last batch is saved"):
        run_loop(config, job.trained, method, accelerator)
    expected = dict(leaves(method.seen[-1]))
    with safe_open(tmp_path / "run" / "bad_batch_rank0.safetensors", "pt") as saved:
        assert tensors <= set(saved.keys())
        assert texts <= set(saved.metadata())
        assert {*saved.keys(), *saved.metadata()} == set(expected)
        for key in saved.keys():  # noqa: SIM118 - a file, no mapping
            torch.testing.assert_close(saved.get_tensor(key), expected[key].cpu(), rtol=0, atol=0, equal_nan=True)
