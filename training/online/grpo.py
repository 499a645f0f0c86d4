"""Policy gradient on the sampler's own steps: text to image (grpo) and inpainting with reward trust (inpaint-rl)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.devices import DTYPES, send
from diffusion_align.objectives.policy_gradient import clipped_policy_loss
from diffusion_align.process import GaussianStep
from diffusion_align.sampling.control import Moment, SamplingOptions
from diffusion_align.training.engine.randomness import STEPS, mix
from diffusion_align.training.policy.guided import GuidedPolicy

from .config import GRPOConfig
from .renoising import check_timesteps
from .rollout import MiniBatch, Rollout, RolloutEngine, RolloutStream, Trajectory, each_tensor
from .stepping.noisy_steps import NoisySteps

#: Largest difference between the log-ratio 0 and what sampler and training batch make of it, by autocast dtype.
RATIO_TOLERANCE = {"no": 1e-4, "fp16": 2e-2, "bf16": 1e-1}


@dataclass(frozen=True)
class Drawn:
    """A sampling step of M pictures that is to be trained on.

    Attributes:
        pictures, columns: (M,) their places in ``StepRecorder.steps``.
        before, after: (M, C, h, w) latents; ``after`` as stored.
        step: what ``after`` was drawn from.
        mask: (M, 1, h, w) where log-probabilities count, or None for everywhere.
    """

    pictures: Tensor
    columns: Tensor
    before: Tensor
    after: Tensor
    step: GaussianStep
    mask: Tensor | None


class StepRecorder:
    """A sampler callback that keeps chosen steps of every picture: latents before and after, and the log-probability.

    Args:
        steps: (N, T) which steps to keep.
        sampling: all of the run.
        etas: noise level of every step.
        dtype: latents are rounded to it before the sampler continues, so that what is stored is what was drawn.
        masked: log-probabilities count the hole only.
    """

    def __init__(
        self,
        steps: Tensor,
        sampling: NoisySteps,
        etas: list[float],
        dtype: torch.dtype,
        masked: bool,
    ) -> None:
        self.steps, self.sampling = steps, sampling
        self.etas, self.dtype, self.masked = etas, dtype, masked
        self.kept: Trajectory | None = None

    def __call__(self, moment: Moment) -> Tensor:
        index = moment.step - 1
        stored = moment.latents.to(self.dtype)
        here = self.steps[moment.rows.start : moment.rows.stop] == index
        rows, columns = here.nonzero(as_tuple=True)
        if len(rows):
            on_device = send(rows, stored.device)
            before, after = moment.before[on_device], stored[on_device]
            with torch.set_grad_enabled(moment.x0.requires_grad):
                step = self.sampling.gaussian(
                    before, moment.x0[on_device], torch.full((len(rows),), index), self.etas[index]
                )
            mask = moment.cond.inpaint[on_device, :1] if self.masked and moment.cond.inpaint is not None else None
            self.keep(Drawn(rows + moment.rows.start, columns, before, after, step, mask), moment, on_device)
        return stored.float()

    def keep(self, drawn: Drawn, moment: Moment, rows: Tensor) -> None:
        """Take note of what was drawn; ``rows`` (M,) are its places in the batch of ``moment``."""
        log_prob = drawn.step.log_prob(drawn.after.float(), drawn.mask)
        found = Trajectory(drawn.before.to(self.dtype), drawn.after, log_prob)
        # Kept where they were computed: reading them here would stall the device at every step.
        places = send(drawn.pictures * self.steps.shape[1] + drawn.columns, drawn.after.device)
        if self.kept is None:
            self.kept = each_tensor(found, lambda part: part.new_zeros(self.steps.numel(), *part.shape[1:]))
        for part in fields(Trajectory):
            getattr(self.kept, part.name)[places] = getattr(found, part.name)

    def trajectory(self) -> Trajectory:
        """What was kept of all pictures."""
        assert self.kept is not None
        return each_tensor(self.kept, lambda part: part.cpu().unflatten(0, self.steps.shape))


class GRPOMethod:
    """Rollouts with fresh noise; updates make the steps of better pictures likelier."""

    def __init__(self, config: GRPOConfig, adapter: Adapter, engine: RolloutEngine, accelerator: Accelerator) -> None:
        self.config, self.adapter, self.engine, self.accelerator = config, adapter, engine, accelerator
        self.policy = GuidedPolicy(adapter, engine.tasks.size, config.guidance_scale)
        check_timesteps(config, adapter)
        size = engine.tasks.size
        self.scheduler = adapter.path.sampler(adapter.pipeline.scheduler, config.noise_kind)
        adapter.set_steps(self.scheduler, config.num_inference_steps, size, size)
        self.sampling = NoisySteps.of(config, adapter, self.scheduler, *config.time_range(adapter.path.straight))
        self.train_steps = self.sampling.check(config.train_steps)
        config.check_updates(config.prompts_per_rollout * config.num_generations * self.train_steps)
        ones = torch.ones(config.num_inference_steps)
        self.step_scale = self.sampling.scales() if config.step_normalisation else ones
        self.masked = config.counts_hole_only()
        self.kl_beta, self.kl_sum, self.kl_count = config.kl_beta, torch.zeros((), device=adapter.device), 0
        self.tested = False
        self.stream = RolloutStream(
            self.draw,
            self.train_steps,
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            config.seed,
            config.num_iterations,
        )

    # -- rollouts ------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[MiniBatch]:
        return iter(self.stream)

    def draw(self, number: int) -> Rollout:
        """A rollout with the chosen steps of its trajectories."""
        config = self.config
        steps, etas = self.choose_steps(number)
        recorder = StepRecorder(steps, self.sampling, etas, DTYPES[config.trajectory_dtype], self.masked)
        rollout = self.sample(number, recorder)
        if number and config.kl_target and self.kl_count:  # after the scorer, which may fail
            self.adapt_kl_beta()
        rollout = replace(rollout, trajectory=recorder.trajectory())
        if not self.tested:
            self.self_test(rollout, number)
            self.tested = True
        rollout = self.engine.teaching(rollout, self.train_steps * config.num_generations)
        return self.with_update_log_probs(rollout, number)

    def choose_steps(self, number: int) -> tuple[Tensor, list[float]]:
        """Which steps (N, train_steps) of a rollout's pictures are trained on, and all sampling steps' noise levels."""
        config = self.config
        pictures = config.prompts_per_rollout * config.num_generations
        shuffle = torch.Generator().manual_seed(
            mix(config.seed, STEPS, number * self.accelerator.num_processes + self.accelerator.process_index)
        )
        noisy = self.sampling.noisy
        if config.stochastic_steps == "window":
            start = int(torch.randint(len(noisy) - self.train_steps + 1, (1,), generator=shuffle))
            window = noisy[start : start + self.train_steps]
            return window.expand(pictures, -1).clone(), self.sampling.etas_in(window)
        choice = torch.stack([torch.randperm(len(noisy), generator=shuffle) for _ in range(pictures)])
        return noisy[choice[:, : self.train_steps]], self.sampling.etas

    def sample(self, number: int, recorder: StepRecorder, graph: Tensor | None = None) -> Rollout:
        """Rollout ``number``, drawn and scored, with ``recorder`` looking on; ``graph`` as in ``SamplingOptions``."""
        config, etas = self.config, recorder.etas
        latents = self.engine.initial_noise(number, config.shared_noise).to(recorder.dtype).float()
        options = SamplingOptions(callback=recorder, latents=latents, graph=graph, copies=self.copies(etas))
        return replace(self.engine.draw(number, self.scheduler, etas, options), steps=recorder.steps)

    def copies(self, etas: list[float]) -> list[int]:
        """How many pictures of a prompt are still the same at each step: all of them until fresh noise came in."""
        config = self.config
        if not config.shared_noise or config.rollout_batch_size % config.num_generations:
            return [1] * len(etas)
        return [1 if any(etas[:step]) else config.num_generations for step in range(len(etas))]

    def with_update_log_probs(self, rollout: Rollout, number: int) -> Rollout:
        """The rollout with log-probabilities before its first update, in batches of the shape that updates have.

        What only the first update trains on needs none: its ratios are 1.
        """
        config = self.config
        first_update = config.per_device_train_batch_size * config.gradient_accumulation_steps
        order = self.stream.order(number, 0, len(rollout) * self.train_steps)
        later = order if config.num_iterations > 1 else order[first_update:]
        found = []
        for start in range(0, len(later), config.per_device_train_batch_size):
            items = later[start : start + config.per_device_train_batch_size]
            batch = MiniBatch.take(rollout, items, self.train_steps, number, on_policy=True)
            with torch.no_grad():
                found.append(self.log_prob(batch)[0])
        if not found:
            return rollout
        assert rollout.trajectory is not None
        log_prob = rollout.trajectory.old_log_prob.clone()
        log_prob[later // self.train_steps, later % self.train_steps] = torch.cat(found).cpu()
        return replace(rollout, trajectory=replace(rollout.trajectory, old_log_prob=log_prob))

    def self_test(self, rollout: Rollout, number: int) -> None:
        """On the policy that drew them, steps must have the ratio 1: exactly when computed twice in the same way, and
        within what other batch shapes and dtypes explain between sampler and update.

        Raises:
            RuntimeError: they have not; updates would follow noise.
        """
        config = self.config
        count = min(config.per_device_train_batch_size, len(rollout) * self.train_steps)
        batch = MiniBatch.take(rollout, torch.arange(count), self.train_steps, number, on_policy=True)
        assert batch.rollout.trajectory is not None
        with torch.no_grad():
            first, second = self.log_prob(batch)[0].cpu(), self.log_prob(batch)[0].cpu()
        again = float((first - second).abs().max())
        sampled = float((first - batch.rollout.trajectory.old_log_prob[torch.arange(count), batch.column]).abs().max())
        precision = self.accelerator.mixed_precision
        limit = RATIO_TOLERANCE[precision]
        self.accelerator.print(
            f"on-policy self-test: |log ratio| {again:.1e} computed twice, {sampled:.1e} between sampler and update",
            file=sys.stderr,
        )
        if again > 0:
            raise RuntimeError(
                f"on-policy self-test failed: the same log-probabilities differ by {again:.1e} when computed twice; "
                "set lora_dropout to 0, or another attention"
            )
        if sampled > limit:
            rounding = "" if precision == "no" else (
                f": {precision} rounds too coarsely for so large sampling steps; raise num_inference_steps, or set "
                "mixed_precision to no"
            )  # fmt: skip
            raise RuntimeError(
                f"on-policy self-test failed: sampler and update disagree by {sampled:.1e} in log-probability "
                f"(allowed with mixed_precision {precision}: {limit:.0e}){rounding}"
            )

    # -- updates -------------------------------------------------------------------------------------------------

    def step_at(self, x_t: Tensor, t: Tensor, steps: Tensor, conditions: Any) -> GaussianStep:
        """The Gaussian over the next latents that the present weights predict; ``steps`` (B,) on the CPU."""
        prediction = self.policy.predict(x_t, t, conditions)
        return self.sampling.gaussian(x_t, prediction.x0, steps)

    def log_prob(self, batch: MiniBatch, with_reference: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (B,) of the recorded steps and, if asked for, KL divergences (B,) to the reference."""
        device, rollout = self.adapter.device, batch.rollout
        assert rollout.steps is not None
        assert rollout.trajectory is not None
        rows = torch.arange(len(batch.column))
        steps = rollout.steps[rows, batch.column]
        x_t = send(rollout.trajectory.before[rows, batch.column], device).float()
        after = send(rollout.trajectory.after[rows, batch.column], device).float()
        t = send(self.sampling.times[steps], device)
        conditions = self.policy.conditions(rollout.prompts, rollout.inpaint)
        mask = send(rollout.inpaint[:, :1], device) if self.masked and rollout.inpaint is not None else None
        with self.accelerator.autocast():
            step = self.step_at(x_t, t, steps, conditions)
            kl = None
            if with_reference:
                with self.adapter.reference():
                    reference = self.step_at(x_t, t, steps, conditions)
                kl = step.kl(reference, mask)
        return step.log_prob(after, mask), kl

    def loss(self, batch: MiniBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped policy-gradient loss of the batch (scalar) and its metrics."""
        config, device, rollout = self.config, self.adapter.device, batch.rollout
        log_prob, kl = self.log_prob(batch, with_reference=bool(self.kl_beta or config.kl_target))
        assert rollout.steps is not None
        rows = torch.arange(len(batch.column))
        old = log_prob.detach()  # where nothing was learned since, the ratio is 1 whatever the kernels do
        if not batch.on_policy:
            assert rollout.trajectory is not None
            old = send(rollout.trajectory.old_log_prob[rows, batch.column], device)
        scale = send(self.step_scale[rollout.steps[rows, batch.column]], device)
        loss, metrics = clipped_policy_loss(
            log_prob * scale,
            old * scale,
            send(rollout.advantage, device),
            config.clip_range,
            send(rollout.trust, device) if config.trust != "none" else None,
        )
        if config.loss_reduction == "sum":
            loss = loss * len(log_prob)
        metrics |= {"reward": send(rollout.reward.mean(), device), "trust": send(rollout.trust.mean(), device)}
        metrics |= {name: send(value, device) for name, value in rollout.skipping().items()}
        if kl is not None:
            loss = loss + self.kl_beta * kl.mean()
            metrics["kl"] = kl.detach().mean()
            self.kl_sum, self.kl_count = self.kl_sum + metrics["kl"], self.kl_count + 1
        return loss, {"loss": loss.detach(), **metrics}

    def adapt_kl_beta(self) -> None:
        """Move kl_beta so that the divergence of the last rollout's updates would have been nearer to the target."""
        mean = self.accelerator.reduce(self.kl_sum / max(self.kl_count, 1), "mean").item()
        error = min(max(mean / self.config.kl_target - 1, -0.5), 0.5)
        self.kl_beta = max(self.kl_beta, 1e-6) * (1 + error)
        self.kl_sum, self.kl_count = torch.zeros_like(self.kl_sum), 0

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        kl = {"kl_beta": self.kl_beta, "kl_sum": float(self.kl_sum), "kl_count": self.kl_count}
        return {**self.stream.state_dict(self.accelerator), **self.engine.state_dict(), **kl}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state, self.accelerator)
        self.engine.load_state_dict(state)
        self.kl_beta, self.kl_count = state["kl_beta"], state["kl_count"]
        self.kl_sum = torch.tensor(state["kl_sum"], device=self.adapter.device)
