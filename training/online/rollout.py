"""Rollouts: draw several pictures of each prompt, score them, say how much better each is than its siblings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data.holes import Holes
from diffusion_align.objectives.policy_gradient import group_advantages
from diffusion_align.objectives.trust import TrustWeight
from diffusion_align.rewards import RewardOutput, RewardScorer
from diffusion_align.sampling.control import PLAIN, SamplingOptions
from diffusion_align.sampling.sampler import sample
from diffusion_align.training.engine.accelerator import filled_steps
from diffusion_align.training.engine.checkpoint import CheckpointError
from diffusion_align.training.engine.protocols import RunInterrupted
from diffusion_align.training.engine.randomness import ITEMS, NOISE, PICTURES, mix, normal
from diffusion_align.training.policy.run_reward import InTurn, RewardHistory, RunReward

from .config import RolloutConfig
from .drawing_tasks import Tasks

#: Rollouts without anything to learn from, one after the other, that stop a run, and what is said then.
MOST_SKIPPED = 20
EQUAL = "zero_advantage skip: {} rollouts in a row, in which the pictures of every prompt have equal rewards"

Held = TypeVar("Held", "Rollout", "Trajectory")


@dataclass(frozen=True)
class Trajectory:
    """Sampling steps of N pictures as they were drawn, T of each.

    Attributes:
        before, after: (N, T, C, h, w) latents that a step started from and led to, as they are stored.
        old_log_prob: (N, T) float32, the mean log-probability of the step under the policy that drew it.
    """

    before: Tensor
    after: Tensor
    old_log_prob: Tensor


@dataclass(frozen=True)
class Rollout:
    """N pictures that were drawn, one row each; tensors lie on the CPU.

    Attributes:
        prompts: N.
        latents: (N, C, h, w) float32 of the finished pictures.
        reward, advantage, trust: (N,) float32.
        group: (N,) int64, a seed that the pictures of a prompt share.
        inpaint: (N, 1 + C, h, w), mask and masked-image latents of inpainting models.
        drawn: (N,) mean reward of all pictures of the prompt, also of those that were not kept (RAFT).
        steps: (N, T) int64, which sampling steps of each picture are trained on (policy gradient).
        trajectory: what was drawn there; None if its graph was kept instead.
        members: (N, M) float32, rewards of an ensemble's members; None of other scorers.
        flat: (N,) share of the drawn prompts whose pictures all have advantage 0, the same in every row; None in
            checkpoints of version 0.1.
    """

    prompts: list[str]
    latents: Tensor
    reward: Tensor
    advantage: Tensor
    trust: Tensor
    group: Tensor
    inpaint: Tensor | None = None
    drawn: Tensor | None = None
    steps: Tensor | None = None
    trajectory: Trajectory | None = None
    flat: Tensor | None = None
    members: Tensor | None = None

    def skipping(self) -> dict[str, Tensor]:
        """How many prompts have nothing to teach."""
        return {} if self.flat is None else {"zero_advantage": self.flat.mean()}

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: Tensor) -> Rollout:
        """The pictures ``rows`` (M,)."""
        prompts = [self.prompts[row] for row in rows.tolist()]
        return replace(each_tensor(self, lambda tensor: tensor[rows]), prompts=prompts)

    def by_scorer(self, group: int) -> Tensor:
        """Rewards (P, K, M) of P prompts' K = ``group`` pictures by all M scorers."""
        found = self.reward[:, None] if self.members is None else self.members
        return found.unflatten(0, (-1, group))

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the prompts by the names of checkpoints, which are those of the fields, here and in
        ``trajectory``."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        if self.trajectory is not None:
            values |= {part.name: getattr(self.trajectory, part.name) for part in fields(self.trajectory)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @classmethod
    def of_tensors(cls, prompts: list[str], tensors: dict[str, Tensor]) -> Rollout:
        """Undo ``tensors``.

        Raises:
            CheckpointError: one is missing, or there is one more.
        """
        of_steps = {part.name for part in fields(Trajectory)}
        steps = {name: tensor for name, tensor in tensors.items() if name in of_steps}
        rest = {name: tensor for name, tensor in tensors.items() if name not in of_steps}
        try:
            return cls(prompts, trajectory=Trajectory(**steps) if steps else None, **rest)
        except TypeError as error:
            raise CheckpointError(f"the checkpoint's rollout has {', '.join(tensors)}: {error}") from error


def each_tensor(held: Held, change: Callable[[Tensor], Tensor]) -> Held:
    """A dataclass with every tensor of its fields, and of the dataclasses among them, changed."""
    changed: dict[str, Any] = {}
    for part in fields(held):
        value = getattr(held, part.name)
        if isinstance(value, Tensor):
            changed[part.name] = change(value)
        elif isinstance(value, Trajectory):
            changed[part.name] = each_tensor(value, change)
    return replace(held, **changed)


@dataclass(frozen=True)
class MiniBatch:
    """What one micro-step trains on.

    Attributes:
        rollout: its pictures (B rows).
        picture: (B,) int64, which pictures of the whole rollout they are.
        column: (B,) int64, which of a picture's training items (sampling step, noise level) each row is.
        number: of the rollout in the run.
        on_policy: no optimiser step was taken since the rollout was drawn.
    """

    rollout: Rollout
    picture: Tensor
    column: Tensor
    number: int
    on_policy: bool

    @classmethod
    def take(cls, rollout: Rollout, items: Tensor, per_picture: int, number: int, on_policy: bool) -> MiniBatch:
        """The training items ``items`` (B,) of a rollout that has ``per_picture`` of each picture."""
        picture = items // per_picture
        return cls(rollout.rows(picture), picture, items % per_picture, number, on_policy)


class RolloutStream:
    """Endless micro-batches: a rollout is drawn when the last one is used up.

    Args:
        draw: makes the rollout of a number.
        items: training items of each picture.
        batch_size: rows of a micro-batch.
        steps: micro-batches of an optimiser step.
        passes: how often a rollout is gone through, each time in another order.
        empty: what is said of so many ({}) rollouts without pictures to train on.
    """

    def __init__(
        self, draw: Callable[[int], Rollout], items: int, batch_size: int, steps: int, seed: int, passes: int = 1,
        empty: str = EQUAL,
    ) -> None:  # fmt: skip
        self.draw, self.items, self.batch_size, self.steps, self.passes = draw, items, batch_size, steps, passes
        self.seed, self.empty = seed, empty
        self.number, self.position = 0, 0
        self.rollout: Rollout | None = None

    def __iter__(self) -> Iterator[MiniBatch]:
        while True:
            if self.rollout is None:
                self.rollout = self.next_rollout()
            count = len(self.rollout) * self.items
            per_pass = count // self.batch_size
            number, position = self.number, self.position
            start = position % per_pass * self.batch_size
            chosen = self.order(number, position // per_pass, count)[start : start + self.batch_size]
            batch = MiniBatch.take(self.rollout, chosen, self.items, number, position < self.steps)
            self.position += 1
            if self.position == per_pass * self.passes:
                self.number, self.position, self.rollout = number + 1, 0, None
            yield batch

    def next_rollout(self) -> Rollout:
        """The next one with pictures to train on; raises RunInterrupted where many in a row have none."""
        for _ in range(MOST_SKIPPED):
            rollout = self.draw(self.number)
            if len(rollout):
                return rollout
            self.number += 1
        raise RunInterrupted(self.empty.format(MOST_SKIPPED))

    def order(self, number: int, turn: int, count: int) -> Tensor:
        """The ``count`` items of rollout ``number`` in the order of pass ``turn``."""
        shuffle = torch.Generator().manual_seed(mix(self.seed, ITEMS, number, turn))
        return torch.randperm(count, generator=shuffle)

    def state_dict(self, accelerator: Accelerator) -> dict[str, Any]:
        """Position, and all processes' pictures of the rollout that is not used up."""
        state: dict[str, Any] = {"number": self.number, "position": self.position, "prompts": None}
        if self.rollout is not None:
            state["prompts"] = gather_object(self.rollout.prompts)
            gather = accelerator.gather if accelerator.num_processes > 1 else lambda tensor: tensor
            for name, tensor in self.rollout.tensors().items():
                state[f"rollout.{name}"] = gather(tensor.to(accelerator.device)).cpu()
        return state

    def load_state_dict(self, state: dict[str, Any], accelerator: Accelerator) -> None:
        self.number, self.position, self.rollout = state["number"], state["position"], None
        if state["prompts"] is not None:
            share = len(state["prompts"]) // accelerator.num_processes
            mine = slice(share * accelerator.process_index, share * (accelerator.process_index + 1))
            tensors = {k.removeprefix("rollout."): v[mine] for k, v in state.items() if k.startswith("rollout.")}
            self.rollout = Rollout.of_tensors(state["prompts"][mine], tensors)


class RolloutEngine:
    """Draws and scores.

    Args:
        trust: weights of pictures from their reward features.
    """

    def __init__(
        self,
        config: RolloutConfig,
        adapter: Adapter,
        accelerator: Accelerator,
        scorer: RewardScorer,
        trust: TrustWeight | None = None,
    ) -> None:
        self.config, self.adapter, self.accelerator, self.trust = config, adapter, accelerator, trust
        self.tasks = Tasks(config, adapter)
        self.scorer = scorer
        self.score = RunReward(scorer, config.scorer_timeout, Path(config.output_dir))
        self.history = RewardHistory(config.history_size, config.history_min_count)
        self.nfe = 0.0

    def draw(
        self,
        number: int,
        scheduler: Any = None,
        eta: float | Sequence[float] = 0.0,
        options: SamplingOptions = PLAIN,
    ) -> Rollout:
        """Rollout ``number`` of this process, with the adapter's present weights.

        Args:
            scheduler, eta, options: of ``sample``; size and batch size are the config's.

        Raises:
            RunInterrupted: the scorer failed; its running statistics are as they were before the rollout.
        """
        config, adapter = self.config, self.adapter
        group, count = config.num_generations, config.prompts_per_rollout
        first = self.first_task(number)
        prompts, holes = self.tasks.take(range(first, first + count))
        prompts = [prompt for prompt in prompts for _ in range(group)]
        seeds = self.picture_seeds(number, group)
        inpaint = None
        if holes is not None:
            with self.accelerator.autocast():
                inpaint = holes.encode(adapter).cpu().repeat_interleave(group, 0)
            holes = holes.repeat_each(group)
        before = self.state_dict()
        training = adapter.network.training
        adapter.network.eval()
        with self.judging(prompts, holes) as judging, self.accelerator.autocast():
            drawn = sample(
                adapter,
                prompts,
                seeds=seeds,
                num_inference_steps=config.num_inference_steps,
                guidance=config.guidance_scale,
                scheduler=scheduler,
                eta=eta,
                inpaint=inpaint,
                options=replace(
                    options,
                    height=self.tasks.size,
                    width=self.tasks.size,
                    batch_size=config.rollout_batch_size,
                    on_pictures=judging.take,
                ),
            )
            adapter.network.train(training)
            self.nfe = drawn.nfe
            try:
                outputs = judging.outputs()
                reward, trust = self.merge(outputs)
            except RunInterrupted:
                self.load_state_dict(before)
                raise
        groups = torch.tensor([mix(config.seed, PICTURES, first + i) for i in range(count) for _ in range(group)])
        advantage = self.advantages(reward, self.tasks.names(range(first, first + count)))
        flat = (advantage.view(count, group) == 0).all(dim=1).float().mean().expand(len(reward)).clone()
        members = RewardOutput.cat(outputs).members
        return Rollout(prompts, drawn.latents, reward, advantage, trust, groups, inpaint, flat=flat, members=members)

    def teaching(self, rollout: Rollout, items: int) -> Rollout:
        """The rollout without prompts whose pictures all have advantage 0, if ``zero_advantage`` says so.

        What is left is a whole number of optimiser steps, equal in all processes: it is filled up with some of those
        prompts, whose loss has no gradient but that of ``kl_beta`` (as in flow_grpo).

        Args:
            items: training items of a prompt.
        """
        if self.config.zero_advantage == "keep":
            return rollout
        group = self.config.num_generations
        taught = (rollout.advantage.view(-1, group) != 0).any(dim=1)
        prompts = filled_steps(self.config, self.accelerator, taught, items)
        if not len(prompts):
            self.accelerator.print("skipped a rollout: every prompt's pictures have equal rewards", file=sys.stderr)
        return rollout.rows((prompts[:, None] * group + torch.arange(group)).flatten())

    def first_task(self, number: int) -> int:
        """Position in the stream of tasks where this process's share of a rollout starts."""
        share = number * self.accelerator.num_processes + self.accelerator.process_index
        return share * self.config.prompts_per_rollout

    def picture_seeds(self, number: int, copies: int) -> list[int]:
        """Seeds of the first ``copies`` pictures of every prompt of a rollout."""
        tasks = range(first := self.first_task(number), first + self.config.prompts_per_rollout)
        return [mix(self.config.seed, PICTURES, task, k) for task in tasks for k in range(copies)]

    def initial_noise(self, number: int, shared: bool) -> Tensor:
        """Noise to start a rollout from (N, C, h, w); ``shared``: the same for all pictures of a prompt."""
        config, adapter = self.config, self.adapter
        copies = 1 if shared else config.num_generations
        side = self.tasks.size // adapter.vae_scale_factor
        noise = normal(torch.tensor(self.picture_seeds(number, copies)), NOISE, (adapter.latent_channels, side, side))
        return noise.repeat_interleave(config.num_generations // copies, 0)

    def judging(self, prompts: list[str], holes: Holes | None) -> InTurn[RewardOutput]:
        """Scores the batches of a rollout as they are drawn; meanwhile, if the scorer is elsewhere."""

        def judge(rows: range, pictures: Tensor) -> RewardOutput:
            part = slice(rows.start, rows.stop)
            its = None if holes is None else holes[part]
            return self.score(pictures if its is None else its.composite(pictures), prompts[part], its)

        return InTurn(judge, meanwhile=self.scorer.elsewhere)

    def merge(self, outputs: Sequence[RewardOutput]) -> tuple[Tensor, Tensor]:
        """Rewards and trust weights (N,)."""
        reward = torch.cat([output.reward for output in outputs])
        if self.trust is None:
            return reward, torch.ones_like(reward)
        features = [output.features for output in outputs if output.features is not None]
        if len(features) < len(outputs):
            raise ValueError(f"trust needs reward features, which scorer {self.scorer.name} does not show")
        return reward, torch.cat([self.trust(part) for part in features])

    def advantages(self, reward: Tensor, names: list[str]) -> Tensor:
        """Of this process's pictures (N,), whose prompts are called ``names`` (N / num_generations).

        Batch, global spread and history are those of all processes' pictures.
        """
        config, accelerator = self.config, self.accelerator
        if accelerator.num_processes > 1:
            reward = accelerator.gather(reward.to(accelerator.device)).cpu()
            names = gather_object(names)
        history = None
        if config.advantage_baseline == "history":
            history = self.history.add(names, reward.view(-1, config.num_generations))
        found = group_advantages(
            reward,
            config.num_generations,
            baseline=config.advantage_baseline,
            scale=config.advantage_scale,
            history=history,
            clip=config.advantage_clip,
        )
        share = len(found) // accelerator.num_processes
        return found[accelerator.process_index * share :][:share]

    def state_dict(self) -> dict[str, Any]:
        """The scorer's running statistics (of an ensemble), and the history of rewards where it is used."""
        used = self.config.advantage_baseline == "history"
        return self.score.state_dict() | ({"reward_history": self.history.state_dict()} if used else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score.load_state_dict(state)
        self.history.load_state_dict(state.get("reward_history", {}))
