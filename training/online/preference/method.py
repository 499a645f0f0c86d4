"""Online preference learning: pairs of own pictures, their errors, a preference loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
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
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.training.engine.sharding import shards
from diffusion_align.training.online.renoising import check_denoising
from diffusion_align.training.online.rollout import Rollout, RolloutEngine
from diffusion_align.training.policy.guided import GuidedPolicy, own_scale

from .config import OnlineDPOConfig
from .extragradient import Extragradient
from .pair_building import Filters, all_pairs, best_and_worst, filtered, listed, random_pairs
from .renoised_lists import Renoised, human_part, own_part
from .replay import replay_source
from .round_log import RoundLog
from .round_loss import RoundLoss
from .round_reference import RoundReference
from .rounds import ListItems, Lists, Round, RoundFacts, RoundStream


@dataclass(frozen=True)
class OnlineBatch:
    """What one micro-step trains on: own pairs, and human ones where they are mixed in."""

    own: ListItems
    human: PairBatch | None


class OnlineDPOMethod:
    """Draws pictures, pairs them by their scores, and trains on the pairs until they are used up."""

    def __init__(
        self, config: OnlineDPOConfig, adapter: Adapter, engine: RolloutEngine, accelerator: Accelerator
    ) -> None:
        check_denoising(config, adapter)
        if config.copies and shards():
            raise ValueError(
                "reference ema or sync, and extragradient, keep whole weights, which FSDP cannot cut: launch it with "
                "DDP, or set reference to frozen and extragradient to false"
            )
        self.config, self.adapter, self.engine, self.accelerator = config, adapter, engine, accelerator
        scale = config.guidance_scale if config.train_guided else own_scale(adapter, config.guidance_scale)
        self.policy = GuidedPolicy(adapter, engine.tasks.size, scale)
        self.round_loss = RoundLoss(config)
        own = adapter.path.straight and config.eta  # flow models' own scheduler draws no noise
        self.scheduler = adapter.path.sampler(adapter.pipeline.scheduler) if own else None
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
        self.extragradient: Extragradient | None = None
        if config.extragradient:
            self.extragradient = Extragradient(adapter, config.num_generations, config.judge_temperature)
        self.taken = 0
        self.log = RoundLog(
            Path(config.output_dir), config.eval_rounds, config.guided_by(adapter.guidance).calls_per_item()
        )

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
        half_step = config.extragradient and number % 2 == 1  # then the policy is about to go back
        if self.log.due(number) and not half_step:
            self.log.finished(self.step)
        self.reference.before_round(number)
        drawn = number // 2 if config.extragradient else number  # two rounds have the same prompts
        latents = self.engine.initial_noise(drawn, True) if config.initial_noise == "shared" else None
        options = SamplingOptions(latents=latents)
        with self.reference.active() if config.draw_from == "reference" else nullcontext():
            rollout = self.gathered(self.engine.draw(drawn, self.scheduler, config.eta, options))
        reward = float(rollout.reward.mean())
        if self.extragradient is not None:
            rollout = self.extragradient.judged(number, rollout)
        found = self.paired(rollout, reward)
        trained = self.stream.length(len(found.lists)) * config.per_device_train_batch_size
        self.log.drawn(number, self.step, found.facts, trained * self.accelerator.num_processes)
        return found

    def gathered(self, rollout: Rollout) -> Rollout:
        """The pictures of all processes."""
        if self.accelerator.num_processes == 1:
            return rollout
        device = self.accelerator.device
        tensors = {name: self.accelerator.gather(tensor.to(device)).cpu() for name, tensor in rollout.tensors().items()}
        return Rollout.of_tensors(gather_object(rollout.prompts), tensors)

    def paired(self, rollout: Rollout, mean_reward: float) -> Round:
        """The pairs of a rollout that are trained on; ``mean_reward`` is what is told of all pictures."""
        config, drawn = self.config, self.config.num_generations
        reward = rollout.reward.view(-1, drawn)
        latents, group = rollout.latents.unflatten(0, (-1, drawn)), rollout.group.view(-1, drawn)[:, 0]
        filters, mask = Filters(config.min_spread, config.min_gap, config.min_distance), None
        if config.pairing == "lists":
            order, present, counts = listed(reward, latents, filters)
            prompt = present.any(dim=1).nonzero()[:, 0]
            places, mask = order[prompt], None if bool(present[prompt].all()) else present[prompt]
        else:
            pairs = self.pairs(reward, group)
            kept, counts = filtered(reward, latents, pairs, filters)
            prompt, places = kept.nonzero()[:, 0], pairs[kept]
        rows = places + prompt[:, None] * drawn
        compared = rollout.reward[rows]
        last = compared[:, -1] if mask is None else torch.where(mask, compared, compared[:, :1]).amin(dim=1)
        gap = float((compared[:, 0] - last).mean()) if len(rows) else 0.0
        facts = RoundFacts(counts, len(rollout), mean_reward, gap, self.engine.nfe * len(rollout))
        found = Lists(
            [rollout.prompts[row] for row in rows[:, 0].tolist()],
            rollout.latents[rows],
            compared,
            group[prompt],
            mask,
            None if rollout.inpaint is None else rollout.inpaint[rows[:, 0]],
        )
        return Round(found, facts)

    def pairs(self, reward: Tensor, group: Tensor) -> Tensor:
        """Places (P, n, 2) of the pairs in ``reward`` (P, K), of prompts with seeds ``group`` (P,)."""
        config = self.config
        if config.pairing == "best_worst":
            return best_and_worst(reward, config.pairs_per_prompt)
        if config.pairing == "random":
            return random_pairs(reward, config.pairs_per_prompt, group.tolist())
        return all_pairs(reward)

    # -- the loss

    def loss(self, batch: OnlineBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean preference loss of own and human pairs (scalar) and its metrics."""
        config, adapter, own = self.config, self.adapter, batch.own
        parts = [own_part(own, adapter.device, config.label_temperature)]
        with self.accelerator.autocast():
            if batch.human is not None:
                parts.append(human_part(batch.human, adapter))
            noisy = Renoised.make(adapter, parts, config)
            prompts = [prompt for part in parts for prompt in part.prompts * part.x0.shape[1]]
            conditions = self.policy.conditions(prompts, noisy.inpaint)
            reference = base = None
            if self.config.needs_reference:
                with self.reference.active():
                    reference = self.policy.predict(noisy.x_t, noisy.t, conditions).output
            if config.kl_beta:
                base = reference
                if config.follows or base is None:
                    with adapter.reference():
                        base = self.policy.predict(noisy.x_t, noisy.t, conditions).output
            output = self.policy.predict(noisy.x_t, noisy.t, conditions).output
        result = self.round_loss(parts, noisy.statistics(parts, output, reference))
        loss, metrics = result.loss, dict(result.metrics)
        if base is not None:
            moved = noisy.errors(output, base).mean()
            loss, metrics["kl"] = loss + config.kl_beta * moved, moved.detach()
        told = own.facts.metrics()
        values = send(torch.tensor(list(told.values())), loss.device).unbind()
        return loss, {"loss": loss.detach(), **metrics, **dict(zip(told, values, strict=True))}

    # -- state

    def state_dict(self) -> dict[str, Any]:
        human = {} if self.human is None else {f"human.{k}": v for k, v in self.human.state_dict().items()}
        own = {**self.stream.state_dict(), **self.engine.state_dict(), **self.reference.state_dict()}
        own |= self.log.state_dict()
        if self.extragradient is not None:
            own |= self.extragradient.state_dict()
        return {"taken": self.taken, **own, **human}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self.stream.load_state_dict(state)
        self.engine.load_state_dict(state)
        self.reference.load_state_dict(state)
        self.log.load_state_dict(state)
        if self.extragradient is not None:
            self.extragradient.load_state_dict(state)
        if self.human is not None:
            self.human.load_state_dict(
                {name.removeprefix("human."): value for name, value in state.items() if name.startswith("human.")}
            )
