"""diffusion-align: diffusion-model preference alignment on one clean core.

Names are imported when first used, so that ``import diffusion_align`` and the command line's help are instant.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.adapters import Adapter, Conditioning, Prediction, load_adapter
    from diffusion_align.data import PairBatch, PairRecord, load_pairs, load_prompts
    from diffusion_align.evaluation import Report, WinRate, win_rate
    from diffusion_align.evaluation.compare import SamplingSettings, compare, sample_and_score
    from diffusion_align.guidance.dynamic import DynamicGuidance
    from diffusion_align.guidance.evaluators import load_evaluator
    from diffusion_align.guidance.schedules import ScheduleGuidance, TableGuidance
    from diffusion_align.objectives import LossOutput, PairStats, preference_loss
    from diffusion_align.rewards import RewardOutput, RewardScorer, load_scorer
    from diffusion_align.sampling.inversion import ddim_invert
    from diffusion_align.sampling.sampler import Samples, generate, sample
    from diffusion_align.sampling.steering import best_of_n, fk_steering, reward_gradient
    from diffusion_align.shipped import shipped_path
    from diffusion_align.training.config import DPOConfig, EvaluatorConfig, InPOConfig, RewardConfig, TrainConfig
    from diffusion_align.training.loop import TrainResult
    from diffusion_align.training.online_config import DRaFTConfig, GRPOConfig, InpaintRLConfig, NFTConfig, RAFTConfig
    from diffusion_align.training.run import train
    from diffusion_align.training.settings import load_recipe

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapters",
    "Conditioning": "adapters",
    "DPOConfig": "training.config",
    "DRaFTConfig": "training.online_config",
    "DynamicGuidance": "guidance.dynamic",
    "EvaluatorConfig": "training.config",
    "GRPOConfig": "training.online_config",
    "InPOConfig": "training.config",
    "InpaintRLConfig": "training.online_config",
    "LossOutput": "objectives",
    "NFTConfig": "training.online_config",
    "PairBatch": "data",
    "PairRecord": "data",
    "PairStats": "objectives",
    "Prediction": "adapters",
    "RAFTConfig": "training.online_config",
    "Report": "evaluation",
    "RewardConfig": "training.config",
    "RewardOutput": "rewards",
    "RewardScorer": "rewards",
    "Samples": "sampling.sampler",
    "SamplingSettings": "evaluation.compare",
    "ScheduleGuidance": "guidance.schedules",
    "TableGuidance": "guidance.schedules",
    "TrainConfig": "training.config",
    "TrainResult": "training.loop",
    "WinRate": "evaluation",
    "best_of_n": "sampling.steering",
    "compare": "evaluation.compare",
    "ddim_invert": "sampling.inversion",
    "fk_steering": "sampling.steering",
    "generate": "sampling.sampler",
    "load_adapter": "adapters",
    "load_evaluator": "guidance.evaluators",
    "load_pairs": "data",
    "load_prompts": "data",
    "load_recipe": "training.settings",
    "load_scorer": "rewards",
    "preference_loss": "objectives",
    "reward_gradient": "sampling.steering",
    "sample": "sampling.sampler",
    "sample_and_score": "evaluation.compare",
    "shipped_path": "shipped",
    "train": "training.run",
    "win_rate": "evaluation",
}

__all__ = [
    "Adapter",
    "Conditioning",
    "DPOConfig",
    "DRaFTConfig",
    "DynamicGuidance",
    "EvaluatorConfig",
    "GRPOConfig",
    "InPOConfig",
    "InpaintRLConfig",
    "LossOutput",
    "NFTConfig",
    "PairBatch",
    "PairRecord",
    "PairStats",
    "Prediction",
    "RAFTConfig",
    "Report",
    "RewardConfig",
    "RewardOutput",
    "RewardScorer",
    "Samples",
    "SamplingSettings",
    "ScheduleGuidance",
    "TableGuidance",
    "TrainConfig",
    "TrainResult",
    "WinRate",
    "best_of_n",
    "compare",
    "ddim_invert",
    "fk_steering",
    "generate",
    "load_adapter",
    "load_evaluator",
    "load_pairs",
    "load_prompts",
    "load_recipe",
    "load_scorer",
    "preference_loss",
    "reward_gradient",
    "sample",
    "sample_and_score",
    "shipped_path",
    "train",
    "win_rate",
]


# `python` started in a checkout finds this folder before the installed package, and would miss rewards/ and training/,
# which lie beside it there.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "training" / "loop.py").is_file() and (_checkout / "rewards" / "base.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
