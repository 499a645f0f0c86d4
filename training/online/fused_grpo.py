"""Policy gradient whose update walks the sampler's own graph: no second forward pass.

With one update per rollout the policy that is updated is the one that drew the pictures, every ratio is 1, and the
gradient of the clipped loss is that of -A log p. The forward pass that PPO would repeat is the one that the sampler has
just made, so its activations are kept until the rewards are known. Costs memory: those of all trained steps of all
pictures of a rollout at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.devices import DTYPES, send
from diffusion_align.sampling.control import Moment
from diffusion_align.training.engine.protocols import RunInterrupted
from diffusion_align.training.engine.sharding import shards

from .config import GRPOConfig
from .grpo import Drawn, GRPOMethod, StepRecorder
from .rollout import MiniBatch, Rollout, RolloutEngine


class GraphRecorder(StepRecorder):
    """Keeps log-probabilities, and divergences to the reference, with their graph.

    Args:
        method: whose policy draws.
        with_reference: measure the divergence.
    """

    def __init__(self, method: FusedGRPOMethod, steps: Tensor, etas: list[float], with_reference: bool) -> None:
        super().__init__(steps, method.sampling, etas, DTYPES[method.config.trajectory_dtype], method.masked)
        self.method, self.with_reference = method, with_reference
        self.places: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.divergences: list[Tensor] = []

    def keep(self, drawn: Drawn, moment: Moment, rows: Tensor) -> None:
        self.places.append(drawn.pictures * self.steps.shape[1] + drawn.columns)
        with torch.enable_grad():
            self.log_probs.append(drawn.step.log_prob(drawn.after.float(), drawn.mask))
        if self.with_reference:
            method, index = self.method, moment.step - 1
            conditions = method.policy.given(moment.cond[rows], moment.null[rows])
            steps = torch.full((len(rows),), index)
            t = send(method.sampling.times[steps], rows.device)
            with method.adapter.reference():
                reference = method.step_at(drawn.before, t, steps, conditions)
            with torch.enable_grad():
                self.divergences.append(drawn.step.kl(reference, drawn.mask))

    def table(self, parts: list[Tensor]) -> Tensor:
        """What was kept, (N, T), in the order of ``steps``."""
        order = torch.cat(self.places).argsort()
        return torch.cat(parts)[send(order, parts[0].device)].view(self.steps.shape)


@dataclass(frozen=True)
class BeforeStep:
    """What rollouts change of a method, as it was before an optimiser step's first one.

    Attributes:
        number: of that rollout.
        kl_beta, kl_sum, kl_count: of ``GRPOMethod``.
        statistics: of the scorer, and of the rewards so far.
    """

    number: int
    kl_beta: float
    kl_sum: Tensor
    kl_count: int
    statistics: dict[str, Any]


class FusedGRPOMethod(GRPOMethod):
    """``GRPOMethod`` with the same gradients, whose updates go back through the sampler's graph.

    Each micro-step draws a rollout of its own, so that graphs are freed by its backward pass.
    """

    def __init__(self, config: GRPOConfig, adapter: Adapter, engine: RolloutEngine, accelerator: Accelerator) -> None:
        if shards() or accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            raise ValueError(
                "fused_rollouts keeps many forward passes for one backward pass, which DeepSpeed and "
                "FSDP cannot: set fused_rollouts to false"
            )
        super().__init__(config, adapter, engine, accelerator)
        self.kept: tuple[Tensor, Tensor | None] | None = None
        self.before_step: BeforeStep | None = None

    def draw(self, number: int) -> Rollout:
        """A rollout whose trained steps keep their graph until ``loss``."""
        config = self.config
        if self.before_step is None or number % config.gradient_accumulation_steps == 0:
            kl = self.kl_beta, self.kl_sum, self.kl_count
            self.before_step = BeforeStep(number, *kl, self.engine.state_dict())
            if number and config.kl_target:
                self.adapt_kl_beta()
        steps, etas = self.choose_steps(number)
        recorder = GraphRecorder(self, steps, etas, with_reference=bool(self.kl_beta or config.kl_target))
        trained = torch.zeros(config.num_inference_steps, len(steps), dtype=torch.bool)
        try:
            rollout = self.sample(number, recorder, graph=trained.scatter(0, steps.T, value=True))
        except RunInterrupted:
            self.take_back(self.before_step)
            raise
        log_prob = recorder.table(recorder.log_probs)
        self.kept = log_prob, recorder.table(recorder.divergences) if recorder.divergences else None
        return rollout

    def take_back(self, before: BeforeStep) -> None:
        """Undo the rollouts of an optimiser step that is not taken."""
        self.stream.number = before.number
        self.kl_beta, self.kl_sum, self.kl_count = before.kl_beta, before.kl_sum, before.kl_count
        self.engine.load_state_dict(before.statistics)

    def log_prob(self, batch: MiniBatch, with_reference: bool = False) -> tuple[Tensor, Tensor | None]:
        """As ``GRPOMethod.log_prob``, from the graph of the rollout that was drawn last; once only."""
        assert self.kept is not None
        (log_prob, kl), self.kept = self.kept, None
        places = send(batch.picture, log_prob.device), send(batch.column, log_prob.device)
        return log_prob[places], kl[places] if kl is not None and with_reference else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = None
        super().load_state_dict(state)
