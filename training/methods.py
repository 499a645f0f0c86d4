"""Every method by name, and where its settings and its run are found. Nothing is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusion_align.adapters import Adapter
    from diffusion_align.rewards import RewardScorer

    from .engine.config import RunConfig
    from .engine.protocols import Job


class Addresses(NamedTuple):
    """Where a method lives, as "module:name"; a module with a leading dot lies in this package.

    Attributes:
        config: the class of its settings, a ``RunConfig`` whose ``method`` is the name in the table.
        job: function (config, accelerator, adapter, scorer) -> ``Job``; adapter and scorer are None where they are to
            be loaded as the settings say.
    """

    config: str
    job: str


METHODS: Mapping[str, Addresses] = MappingProxyType(
    {
        "dpo": Addresses(".pairs.config:DPOConfig", ".pairs.job:dpo_job"),
        "inpo": Addresses(".pairs.config:InPOConfig", ".pairs.job:inpo_job"),
        "kto": Addresses(".pairs.beyond_pairs.config:KTOConfig", ".pairs.job:kto_job"),
        "sft": Addresses(".pairs.config:SFTConfig", ".pairs.job:sft_job"),
        "inpaint-rl": Addresses(".online.config:InpaintRLConfig", ".online.policy_gradient_job:inpaint_rl_job"),
        "grpo": Addresses(".online.config:GRPOConfig", ".online.policy_gradient_job:grpo_job"),
        "nft": Addresses(".online.config:NFTConfig", ".online.nft:nft_job"),
        "raft": Addresses(".online.config:RAFTConfig", ".online.raft:raft_job"),
        "online-dpo": Addresses(".online.preference.config:OnlineDPOConfig", ".online.preference.job:online_dpo_job"),
        "draft": Addresses(".online.gradients.config:DRaFTConfig", ".online.gradients.job:draft_job"),
        "reward": Addresses(".scorers.config:RewardConfig", ".scorers.job:reward_job"),
        "evaluator": Addresses(".evaluators.config:EvaluatorConfig", ".evaluators.job:evaluator_job"),
    }
)


def config_class(method: str) -> type[RunConfig]:
    """The class of a method's settings.

    Raises:
        ValueError: no such method.
    """
    found: type[RunConfig] = _find(_addresses(method).config)
    return found


def build_job(
    config: RunConfig, accelerator: Accelerator, adapter: Adapter | None = None, scorer: RewardScorer | None = None
) -> Job:
    """The run that ``config`` describes, made ready.

    Args:
        adapter: a loaded model to train instead of the one that the settings name.
        scorer: a loaded scorer to learn from instead of the one that the settings name.

    Raises:
        ValueError, FileNotFoundError, OSError: settings, model or data that cannot be used; the message names what.
    """
    job: Job = _find(_addresses(config.method).job)(config, accelerator, adapter, scorer)
    return job


def _addresses(method: str) -> Addresses:
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: expected one of {', '.join(METHODS)}")
    return METHODS[method]


def _find(address: str) -> Any:
    module, _, name = address.partition(":")
    return getattr(import_module(module, __package__), name)
