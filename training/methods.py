"""Every method's settings, by name. Nothing heavy is imported here, so that --help is instant."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .config import DPOConfig, EvaluatorConfig, InPOConfig, RewardConfig, RunConfig
from .online_config import DRaFTConfig, GRPOConfig, InpaintRLConfig, NFTConfig, RAFTConfig

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
