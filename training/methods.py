"""Every method's settings, by name. Nothing heavy is imported here, so that --help is instant."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .engine.config import RunConfig
from .evaluators.config import EvaluatorConfig
from .online.config import DRaFTConfig, GRPOConfig, InpaintRLConfig, NFTConfig, RAFTConfig
from .pairs.config import DPOConfig, InPOConfig
from .scorers.config import RewardConfig

CONFIGS: Mapping[str, type[RunConfig]] = MappingProxyType(
    {
        config.method: config
        for config in (
            DPOConfig,
            InPOConfig,
            InpaintRLConfig,
            GRPOConfig,
            NFTConfig,
            RAFTConfig,
            DRaFTConfig,
            RewardConfig,
            EvaluatorConfig,
        )
    }
)
