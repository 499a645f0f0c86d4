"""Online preference learning: pairs of own pictures, their errors, a preference loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data import PairBatch
from diffusion_align.devices import send
from diffusion_align.objectives.pair_stats import PairStats
from diffusion_align.objectives.preference import PREFERENCE_LOSSES, check_losses, preference_loss
from diffusion_align.process import average
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.training.engine.randomness import NOISE, TIMESTEP, generators, mix, normal
from diffusion_align.training.engine.sharding import shards
from diffusion_align.training.online.renoising import check_timesteps
from diffusion_align.training.online.rollout import Rollout, RolloutEngine
from diffusion_align.training.policy.guided import GuidedPolicy

from .config import OnlineDPOConfig
from .pair_building import Filters, all_pairs, best_and_worst, filtered, paired_gap, random_pairs
from .replay import clean_latents, replay_source
from .round_log import RoundLog
from .round_reference import RoundReference
from .rounds import PairItems, Pairs, Round, RoundFacts, RoundStream


@dataclass(frozen=True)
class OnlineBatch:
    """What one micro-step trains on: own pairs, and human ones where they are mixed in."""

    own: PairItems
    human: PairBatch | None


@dataclass(frozen=True)
class RenoisedPairs:
    """B pairs at noise levels that follow from their seeds, chosen ones first: all of them, then all rejected ones.

    Attributes:
        x_t, target: (2B, C, h, w).
        t: (2B,).
        mask: (2B, 1, h, w), where errors are taken of inpainting models; None is everywhere.
    """

    x_t: Tensor
    target: Tensor
    t: Tensor
    mask: Tensor | None

    def errors(self, output: Tensor) -> Tensor:
        """Mean squared error of each row, (2B,) float32."""
        return average((output.float() - self.target.float()).square(), self.mask)


class OnlineDPOMethod:
    """Draws pictures, pairs them by their scores, and trains on the pairs until they are used up."""

    def __init__(
        self, config: OnlineDPOConfig, adapter: Adapter, engine: RolloutEngine, accelerator: Accelerator
    ) -> None:
        check_timesteps(config, adapter)
        check_losses(config.loss_types, config.loss_weights or None)
        if config.follows and shards():
            raise ValueError(
                f"reference {config.reference} keeps whole weights, which FSDP cannot cut: launch it with DDP, or set "
                "reference to frozen"
            )
        self.config, self.adapter, self.engine, self.accelerator = config, adapter, engine, accelerator
        scale = config.guidance_scale if config.train_guided else 1.0
        self.policy = GuidedPolicy(adapter, engine.tasks.size, scale)
        self.needs_reference = any(PREFERENCE_LOSSES[name].needs_reference for name in config.loss_types)
        self.reference = RoundReference(config, adapter)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        self.stream = RoundStream(
            self.draw,
            config.updates_per_picture,
            config.own,
            config.gradient_accumulation_steps,
            config.seed,
            config.num_iterations,
            rank,
            world_size,
        )
        self.human = replay_source(config, adapter, engine.tasks.size, rank, world_size) if config.replayed else None
        self.taken = 0
        self.log = RoundLog(Path(config.output_dir), config.eval_rounds, config.calls_per_item())

    @property
    def step(self) -> int:
        """Optimiser steps that are begun."""
        return self.taken // self.config.gradient_accumulation_steps

    # -- batches

    def batches(self) -> Iterator[OnlineBatch]:
        own, human = iter(self.stream), None if self.human is None else iter(self.human)
        while True:
            if self.taken % self.config.gradient_accumulation_steps == 0:
                self.reference.after_step(self.step)
            batch = OnlineBatch(next(own), None if human is None else next(human))
            self.taken += 1
            yield batch

    def draw(self, number: int) -> Round:
        """Draw, score and pair; the reference moves on first."""
        config = self.config
        if self.log.due(number):
            self.log.finished(self.step)
        self.reference.before_round(number)
        latents = self.engine.initial_noise(number, True) if config.initial_noise == "shared" else None
        options = SamplingOptions(latents=latents)
        if config.draw_from == "reference":
            with self.reference.active():
                rollout = self.engine.draw(number, eta=config.eta, options=options)
        else:
            rollout = self.engine.draw(number, eta=config.eta, options=options)
        found = self.paired(self.gathered(rollout))
        trained = self.stream.length(len(found.pairs)) * config.per_device_train_batch_size
        self.log.drawn(number, self.step, found.facts, trained * self.accelerator.num_processes)
        return found

    def gathered(self, rollout: Rollout) -> Rollout:
        """The pictures of all processes."""
        if self.accelerator.num_processes == 1:
            return rollout
        device = self.accelerator.device
        tensors = {name: self.accelerator.gather(tensor.to(device)).cpu() for name, tensor in rollout.tensors().items()}
        return Rollout.of_tensors(gather_object(rollout.prompts), tensors)

    def paired(self, rollout: Rollout) -> Round:
        """The pairs of a rollout that are trained on."""
        config, drawn = self.config, self.config.num_generations
        reward = rollout.reward.view(-1, drawn)
        latents, group = rollout.latents.unflatten(0, (-1, drawn)), rollout.group.view(-1, drawn)[:, 0]
        if config.pairing == "best_worst":
            pairs = best_and_worst(reward, config.pairs_per_prompt)
        elif config.pairing == "random":
            pairs = random_pairs(reward, config.pairs_per_prompt, group.tolist())
        else:
            pairs = all_pairs(reward)
        filters = Filters(config.min_spread, config.min_gap, config.min_distance)
        kept, counts = filtered(reward, latents, pairs, filters)
        prompt = kept.nonzero()[:, 0]
        rows = pairs[kept] + prompt[:, None] * drawn
        gap = paired_gap(reward, pairs)[kept]
        facts = RoundFacts(
            counts,
            len(rollout),
            float(rollout.reward.mean()),
            float(gap.mean()) if len(gap) else 0.0,
            self.engine.nfe * len(rollout),
        )
        found = Pairs(
            [rollout.prompts[row] for row in rows[:, 0].tolist()],
            rollout.latents[rows],
            rollout.reward[rows],
            group[prompt],
            None if rollout.inpaint is None else rollout.inpaint[rows[:, 0]],
        )
        return Round(found, facts)

    # -- the loss

    def loss(self, batch: OnlineBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean preference loss of own and human pairs (scalar) and its metrics."""
        config, adapter, own = self.config, self.adapter, batch.own
        prompts: list[str] = own.pairs.prompts
        x0, seeds = send(own.pairs.latents, adapter.device), pair_seeds(own)
        soft_labels = weight = None
        with self.accelerator.autocast():
            if batch.human is not None:
                human = batch.human
                x0 = torch.cat([x0, clean_latents(adapter, human)])
                prompts = [*prompts, *(caption or "" for caption in human.captions)]
                seeds = torch.cat([seeds, human.seeds])
                soft_labels, weight = (
                    with_ones(human.preference, len(own.pairs)),
                    with_ones(human.weight, len(own.pairs)),
                )
            noisy = self.renoised(x0, seeds, own.pairs.inpaint)
            inpaint = None if own.pairs.inpaint is None else own.pairs.inpaint.repeat(2, 1, 1, 1)
            conditions = self.policy.conditions([*prompts, *prompts], inpaint)
            reference = base = None
            if self.needs_reference:
                with self.reference.active():
                    reference = self.policy.predict(noisy.x_t, noisy.t, conditions).output
            if config.kl_beta:
                base = reference
                if config.follows or base is None:
                    with adapter.reference():
                        base = self.policy.predict(noisy.x_t, noisy.t, conditions).output
            output = self.policy.predict(noisy.x_t, noisy.t, conditions).output
        errors = noisy.errors(output)
        references = () if reference is None else noisy.errors(reference).chunk(2)
        result = preference_loss(
            config.loss_types,
            PairStats(*errors.chunk(2), *references),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            soft_labels=soft_labels,
            sample_weight=weight,
            loss_weights=config.loss_weights or None,
        )
        loss, metrics = result.loss, dict(result.metrics)
        if config.sft_weight:
            loss = loss + config.sft_weight * errors.chunk(2)[0].mean()
        if base is not None:
            moved = average((output.float() - base.float()).square(), noisy.mask).mean()
            loss, metrics["kl"] = loss + config.kl_beta * moved, moved.detach()
        told = {name: send(torch.tensor(value), loss.device) for name, value in own.facts.metrics().items()}
        return loss, {"loss": loss.detach(), **metrics, **told}

    def renoised(self, x0: Tensor, seeds: Tensor, inpaint: Tensor | None) -> RenoisedPairs:
        """Pairs ``x0`` (B, 2, C, h, w) at noise levels of ``seeds`` (B,): both pictures of a pair meet the same."""
        config, path, device = self.config, self.adapter.path, self.adapter.device
        last = min(config.max_timestep, path.num_timesteps)
        t = send(path.draw_times(generators(seeds, TIMESTEP), config.min_timestep, last), device).repeat(2)
        eps = send(normal(seeds, NOISE, x0.shape[2:]), device).repeat(2, 1, 1, 1)
        flat = x0.transpose(0, 1).flatten(0, 1)
        mask = None if inpaint is None else send(inpaint[:, :1], device).repeat(2, 1, 1, 1)
        return RenoisedPairs(path.noise(flat, eps, t), path.target(flat, eps, t), t, mask)

    # -- state

    def state_dict(self) -> dict[str, Any]:
        human = {} if self.human is None else {f"human.{k}": v for k, v in self.human.state_dict().items()}
        own = {**self.stream.state_dict(), **self.engine.state_dict(), **self.reference.state_dict()}
        own |= self.log.state_dict()
        return {"taken": self.taken, **own, **human}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self.stream.load_state_dict(state)
        self.engine.load_state_dict(state)
        self.reference.load_state_dict(state)
        self.log.load_state_dict(state)
        if self.human is not None:
            self.human.load_state_dict(
                {name.removeprefix("human."): value for name, value in state.items() if name.startswith("human.")}
            )


def pair_seeds(items: PairItems) -> Tensor:
    """Seeds of timestep and noise, (B,) int64: all pairs of a prompt meet the same, level by level."""
    columns = zip(items.pairs.group.tolist(), items.column.tolist(), strict=True)
    return torch.tensor([mix(group, column, items.number) for group, column in columns])


def with_ones(human: Tensor, own: int) -> Tensor | None:
    """Numbers of the human pairs after ones for ``own`` pairs; None where all are 1."""
    return torch.cat([torch.ones(own), human.float().cpu()]) if bool((human != 1).any()) else None
