"""One batch on its way from noise to pictures: any adapter, any guider, any diffusers scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from PIL import Image
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.devices import send
from diffusion_align.guidance.guider import DISTILLED, UNGUIDED, StepGuidance, StepView
from diffusion_align.process import model_calls, model_input, start_scale
from diffusion_align.showing import MOST, grid_html, pil_pictures

from .control import GuidedStep, Moment, StepCallback, StepPlan
from .step_noise import StepNoise


@dataclass(frozen=True, repr=False)
class Samples:
    """Images and how they were made.

    Attributes:
        images: (N, 3, H, W) float32 in [0, 1], on the CPU.
        latents: (N, C, h, w) float32 of the finished pictures, on the CPU.
        scales: (steps, N), the guidance scales, one for each step that was asked for; empty for diffusers' own guiders,
            which do not tell.
        nfe: denoiser evaluations per image.
        records: per image, what the guider tells of its choices (``DynamicGuidance``); else empty.
        trajectory: (steps + 1, N, C, h, w) latents from noise to image on the CPU, if asked for; none within a step.
    """

    images: Tensor
    latents: Tensor
    scales: Tensor
    nfe: float
    records: list[dict[str, Any]] = field(default_factory=list)
    trajectory: Tensor | None = None

    def pil(self) -> list[Image.Image]:
        """The pictures as PIL has them."""
        return pil_pictures(self.images)

    def __repr__(self) -> str:
        height, width = self.images.shape[-2:]
        return f"Samples({len(self.images)} pictures of {width}x{height}, {self.nfe:g} denoiser calls each)"

    def _repr_html_(self) -> str:
        shown = pil_pictures(self.images[:MOST])
        return grid_html(shown, [str(place) for place in range(len(shown))], len(self.images))


@dataclass
class BatchRun:
    """A batch of B pictures.

    Attributes:
        guider: remembers this run only.
        scheduler: a copy that belongs to this run.
        prompts: B.
        cond, null: conditioning of prompts and null prompts (B).
        rows: places of the batch among all N images of ``plan``.
        calls: predictions made so far, times pictures.
    """

    adapter: Adapter
    guider: BaseGuidance
    scheduler: Any
    prompts: list[str]
    cond: Conditioning
    null: Conditioning
    rows: range
    plan: StepPlan
    calls: int = 0

    def draw(
        self,
        noise: Tensor,
        generators: list[torch.Generator],
        callback: StepCallback | None,
        keep_trajectory: bool,
    ) -> Samples:
        """The pictures that ``noise`` (B, C, h, w) leads to; fresh noise comes from the pictures' ``generators``."""
        adapter, scheduler = self.adapter, self.scheduler
        step_noise = StepNoise.of(scheduler, generators)
        # On the CPU: schedulers look things up by the timestep, and would ask the device for it at every step.
        steps = len(self.plan.etas)
        factor = adapter.vae_scale_factor
        adapter.set_steps(scheduler, steps, noise.shape[-2] * factor, noise.shape[-1] * factor)
        times = send(adapter.path.times(scheduler), adapter.device)
        levels = adapter.path.step_levels(scheduler, steps)
        latents = before = send(noise, adapter.device) * start_scale(scheduler)
        path = [latents] if keep_trajectory else []
        for place, (call, t) in enumerate(zip(model_calls(scheduler, steps), scheduler.timesteps, strict=True)):
            before = latents if call.opens else before
            x_t = model_input(scheduler, latents, t)
            keeps_x_t = x_t is latents
            view = StepView(
                call.step,
                steps,
                x_t.float(),
                levels[call.step] if call.opens else adapter.path.call_level(scheduler, place),
                levels[call.step + 1],
                self.cond,
                self.rows,
                adapter.path.output,
                adapter.decode,
                self.prompts,
                again=not call.opens,
                space=adapter.latent_space,
            )
            with torch.set_grad_enabled(bool(self.traced(call.step).any())):
                output = self.guided(view, times[place])
                if self.plan.on_guided is not None:
                    self.plan.on_guided(GuidedStep(view, output, partial(self.plain, view, times[place])))
                x0 = view.clean(output) if callback is not None and call.closes else None
            extras = step_noise.arguments(self.plan.etas[call.step], output)
            latents = scheduler.step(output, t, latents, **extras, return_dict=False)[0]
            if callback is not None and x0 is not None:
                # Euler-like schedulers keep x0 + sigma eps and scale it for the denoiser; the others keep x_t.
                signal = levels[call.step + 1].alpha if keeps_x_t else 1.0
                replaced = callback(
                    Moment(call.step + 1, before, latents, x0, signal, scheduler, self.cond, self.null, self.rows)
                )
                latents = latents if replaced is None else replaced
            if keep_trajectory and call.closes:
                path.append(latents)
        images = (adapter.decode(latents) / 2 + 0.5).clamp(0, 1).cpu()
        guider, records = self.guider, []
        scales = torch.empty(steps, 0)
        if isinstance(guider, StepGuidance):
            scales, records = torch.stack(guider.scales).float().cpu(), guider.records()
        trajectory = torch.stack(path).cpu() if keep_trajectory else None
        return Samples(images, latents.float().cpu(), scales, self.calls / len(self.prompts), records, trajectory)

    def traced(self, step: int) -> Tensor:
        """Which of the batch's predictions keep their graph, (B,) bool."""
        return self.plan.graph[step, self.rows.start : self.rows.stop]

    def guided(self, view: StepView, t: Tensor) -> Tensor:
        """The guider's combination of the predictions it asks for, (B, C, h, w)."""
        guider, strength = self.guider, self.plan.strengths[view.step]
        if isinstance(guider, StepGuidance):
            guider.bind(view)
        guider.set_state(step=view.step, num_inference_steps=view.num_steps, timestep=t)
        if not self.plan.two_branches:
            if self.adapter.embeds_guidance:
                return self.distilled(view, t)
            if guider.num_conditions > 1:
                raise ValueError(UNGUIDED)
        branches = guider.prepare_inputs({"cond": (self.cond, self.null)})
        if type(guider).prepare_models is BaseGuidance.prepare_models:
            run = self.plan.copies[view.step]
            conds = [branch.cond[::run] for branch in branches]
            both = conds[0] if len(conds) == 1 else Conditioning.cat(conds)
            with_graph = self.traced(view.step).view(-1, run).any(dim=1).repeat(len(conds))
            found = self.predict_rows(view.x_t[::run].repeat(len(conds), 1, 1, 1), t, both, strength, with_graph)
            outputs = found.repeat_interleave(run, dim=0).chunk(len(conds))
        else:  # guiders that perturb the network do so for one branch at a time
            parts = []
            for branch in branches:
                guider.prepare_models(self.adapter.network)
                parts.append(self.predict(view.x_t, t, branch.cond, strength))
                guider.cleanup_models(self.adapter.network)
            outputs = tuple(parts)
        for branch, output in zip(branches, outputs, strict=True):
            branch.noise_pred = output
        combined: Tensor = guider(branches).pred
        skipped = self.plan.skipped
        if skipped is None or not skipped.at(view.step, view.num_steps):
            return combined
        if len(branches) == 1:
            raise ValueError(
                f"skip_guidance_layers needs guidance by two predictions, which step {view.step} has not: take a "
                "guidance scale above 1, or other skip_layer_guidance_start and skip_layer_guidance_stop"
            )
        without = self.predict(view.x_t, t, self.cond, strength, skipped.layers)
        return combined + skipped.scale * (outputs[0] - without)

    @torch.no_grad()
    def plain(self, view: StepView, t: Tensor, model: Adapter | None = None) -> tuple[Tensor, Tensor]:
        """Predictions of the run's model or ``model`` with the prompts and the null prompts, (B, C, h, w) each; these
        calls are not counted."""
        x_t, conds = view.x_t.repeat(2, 1, 1, 1), Conditioning.cat([self.cond, self.null])
        if model is None:
            counted = self.calls
            both = self.predict(x_t, t, conds, self.plan.strengths[view.step])
            self.calls = counted
        else:
            both = model.predict(x_t, t.expand(len(x_t)), conds).output
        cond, null = both.chunk(2)
        return cond, null

    def distilled(self, view: StepView, t: Tensor) -> Tensor:
        """The prediction of a model that takes the guidance scale as an input, (B, C, h, w).

        Raises:
            ValueError: the guider combines predictions.
        """
        if not isinstance(self.guider, StepGuidance):
            raise ValueError(f"{type(self.guider).__name__} combines predictions of several branches, {DISTILLED}")
        run = self.plan.copies[view.step]
        scales = send(self.guider.embedded(len(view.x_t)), view.x_t.device)
        cond = replace(self.cond, guidance=scales)[::run]
        with_graph = self.traced(view.step).view(-1, run).any(dim=1)
        strength = self.plan.strengths[view.step]
        return self.predict_rows(view.x_t[::run], t, cond, strength, with_graph).repeat_interleave(run, dim=0)

    def predict_rows(self, x_t: Tensor, t: Tensor, cond: Conditioning, strength: float, with_graph: Tensor) -> Tensor:
        """``predict``, keeping the activations of those rows (B,) only that need a graph."""
        if bool(with_graph.all()) or not bool(with_graph.any()):
            return self.predict(x_t, t, cond, strength)
        rows = send(torch.cat([with_graph.nonzero(), (~with_graph).nonzero()]).flatten(), x_t.device)
        kept, rest = rows.split([int(with_graph.sum()), int((~with_graph).sum())])
        traced = self.predict(x_t[kept], t, cond[kept], strength)
        with torch.no_grad():
            untraced = self.predict(x_t[rest], t, cond[rest], strength)
        return torch.cat([traced, untraced])[rows.argsort()]

    def predict(
        self, x_t: Tensor, t: Tensor, cond: Conditioning, strength: float, skipped: tuple[int, ...] = ()
    ) -> Tensor:
        """Denoiser output of policy and reference, without ``skipped`` blocks, mixed by the alignment strength."""
        adapter, timesteps = self.adapter, t.expand(len(x_t))
        self.calls += len(x_t) * (1 if strength in (0, 1) else 2)
        if strength == 1:
            return adapter.predict(x_t, timesteps, cond, skipped).output
        with adapter.reference():
            reference = adapter.predict(x_t, timesteps, cond, skipped).output
        if strength == 0:
            return reference
        return reference + strength * (adapter.predict(x_t, timesteps, cond, skipped).output - reference)
