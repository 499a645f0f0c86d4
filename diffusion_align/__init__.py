"""diffusion-align: diffusion-model preference alignment on one clean core.

Names are imported when first used, so that ``import diffusion_align`` and the command line's help are instant.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.rewards import RewardOutput, RewardScorer, load_scorer
    from diffusion_align.training.engine.loop import TrainResult
    from diffusion_align.training.evaluators.config import EvaluatorConfig
    from diffusion_align.training.online.config import GRPOConfig, InpaintRLConfig, NFTConfig, RAFTConfig
    from diffusion_align.training.online.gradients.config import DRaFTConfig
    from diffusion_align.training.online.preference.config import OnlineDPOConfig
    from diffusion_align.training.pairs.beyond_pairs.config import KTOConfig
    from diffusion_align.training.pairs.config import DPOConfig, InPOConfig, SFTConfig
    from diffusion_align.training.policy.config import TrainConfig
    from diffusion_align.training.run import train
    from diffusion_align.training.scorers.config import RewardConfig
    from diffusion_align.training.settings import load_recipe

    from .adapters import Adapter, Conditioning, load_adapter
    from .data import PairBatch, PairRecord, load_examples, load_pairs, load_prompts
    from .evaluation import Report, WinRate, win_rate
    from .evaluation.compare import SamplingSettings, compare, sample_and_score
    from .guidance.dynamic import DynamicGuidance
    from .guidance.judges.evaluator import load_evaluator
    from .guidance.schedules import ScheduleGuidance, TableGuidance
    from .objectives import LossOutput, PairStats, preference_loss
    from .process import Prediction, ddim_invert
    from .sampling.batch_run import Samples
    from .sampling.control import SamplingOptions
    from .sampling.sampler import generate, sample
    from .sampling.steering import best_of_n, fk_steering, reward_gradient
    from .shipped import shipped_path

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapters",
    "Conditioning": "adapters",
    "DPOConfig": "training.pairs.config",
    "DRaFTConfig": "training.online.gradients.config",
    "DynamicGuidance": "guidance.dynamic",
    "EvaluatorConfig": "training.evaluators.config",
    "GRPOConfig": "training.online.config",
    "InPOConfig": "training.pairs.config",
    "InpaintRLConfig": "training.online.config",
    "KTOConfig": "training.pairs.beyond_pairs.config",
    "LossOutput": "objectives",
    "NFTConfig": "training.online.config",
    "OnlineDPOConfig": "training.online.preference.config",
    "PairBatch": "data",
    "PairRecord": "data",
    "PairStats": "objectives",
    "Prediction": "process",
    "RAFTConfig": "training.online.config",
    "Report": "evaluation",
    "RewardConfig": "training.scorers.config",
    "RewardOutput": "rewards",
    "RewardScorer": "rewards",
    "SFTConfig": "training.pairs.config",
    "Samples": "sampling.batch_run",
    "SamplingOptions": "sampling.control",
    "SamplingSettings": "evaluation.compare",
    "ScheduleGuidance": "guidance.schedules",
    "TableGuidance": "guidance.schedules",
    "TrainConfig": "training.policy.config",
    "TrainResult": "training.engine.loop",
    "WinRate": "evaluation",
    "best_of_n": "sampling.steering",
    "compare": "evaluation.compare",
    "ddim_invert": "process",
    "fk_steering": "sampling.steering",
    "generate": "sampling.sampler",
    "load_adapter": "adapters",
    "load_evaluator": "guidance.judges.evaluator",
    "load_examples": "data",
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
    "KTOConfig",
    "LossOutput",
    "NFTConfig",
    "OnlineDPOConfig",
    "PairBatch",
    "PairRecord",
    "PairStats",
    "Prediction",
    "RAFTConfig",
    "Report",
    "RewardConfig",
    "RewardOutput",
    "RewardScorer",
    "SFTConfig",
    "Samples",
    "SamplingOptions",
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
    "load_examples",
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


class _Beside:
    """Finds rewards/ and training/, which lie beside this folder in a checkout: `python` that is started there finds
    this folder before the installed package. (The checkout in ``__path__`` would do it, too, and make tests/ and
    benchmarks/ look like parts of the package.)"""

    checkout = Path(__file__).resolve().parent.parent

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        room = name.removeprefix(f"{__name__}.")
        if room == name or room not in ("rewards", "training"):
            return None
        folder = cls.checkout / room
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


if (_Beside.checkout / "training" / "run.py").is_file() and (_Beside.checkout / "rewards" / "protocol.py").is_file():
    sys.meta_path.append(_Beside)  # after Python's own finders, which know an installed package's folders


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from .names import hint

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint(name, _HOMES)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
