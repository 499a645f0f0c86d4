"""One sampler: any adapter, any guider, any diffusers scheduler; the images diffusers' own pipelines give."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.adapters.prompts import conditioning
from diffusion_align.devices import send
from diffusion_align.guidance.guider import StepGuidance, StepView
from diffusion_align.guidance.schedules import as_guider
from diffusion_align.process import Level

#: A scale, one per image, a (steps, images) table, or a guider (ours or diffusers').
Guidance: TypeAlias = float | Sequence[float] | Tensor | BaseGuidance


@dataclass(frozen=True)
class Moment:
    """A batch between two steps, as a callback sees it.

    Attributes:
        step: how many steps are done.
        before: (B, C, h, w), what the step started from, in the scheduler's own scaling.
        latents: (B, C, h, w) likewise, what the next step starts from.
        x0: (B, C, h, w), the step's prediction of the clean latents; with a graph where ``sample`` was asked for one.
        signal: share of x0 in the latents: alpha, or 1 in schedulers that scale their input.
        scheduler: advanced to the next step.
        cond, null: conditioning of prompts and null prompts (B).
        rows: positions of the batch among all images.
    """

    step: int
    before: Tensor
    latents: Tensor
    x0: Tensor
    signal: float
    scheduler: Any
    cond: Conditioning
    null: Conditioning
    rows: range


#: Called after every step; latents (B, C, h, w) that it returns replace the step's.
StepCallback: TypeAlias = Callable[[Moment], Tensor | None]


@dataclass(frozen=True)
class Samples:
    """Images and how they were made.

    Attributes:
        images: (N, 3, H, W) float32 in [0, 1], on the CPU.
        latents: (N, C, h, w) float32 of the finished pictures, on the CPU.
        scales: (steps, N), the guidance scales; empty for diffusers' own guiders, which do not tell.
        nfe: denoiser evaluations per image.
        records: per image, what the guider tells of its choices (``DynamicGuidance``); else empty.
        trajectory: (steps + 1, N, C, h, w) latents from noise to image on the CPU, if asked for.
    """

    images: Tensor
    latents: Tensor
    scales: Tensor
    nfe: float
    records: list[dict[str, Any]] = field(default_factory=list)
    trajectory: Tensor | None = None


def generate(
    adapter: Adapter,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    seeds: Sequence[int],
    **options: Any,
) -> Tensor:
    """The images of :func:`sample` with constant guidance, (N, 3, height, width) float32 in [0, 1] on the CPU."""
    return sample(
        adapter, prompts, num_inference_steps=num_inference_steps, guidance=guidance_scale, seeds=seeds, **options
    ).images


@torch.no_grad()
def sample(
    adapter: Adapter,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 25,
    guidance: Guidance = 5.0,
    seeds: Sequence[int],
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    scheduler: Any = None,
    negative_prompts: Sequence[str] | None = None,
    eta: float | Sequence[float] = 0.0,
    inpaint: Tensor | None = None,
    latents: Tensor | None = None,
    alignment_strength: float | Sequence[float] = 1.0,
    callback: StepCallback | None = None,
    keep_trajectory: bool = False,
    graph: Tensor | None = None,
    copies: int | Sequence[int] = 1,
) -> Samples:
    """Draw one image per prompt with the adapter's policy (inside ``adapter.reference()``: with the base).

    An image depends on its prompt and seed alone, not on its batch; with constant guidance it is the one that the
    diffusers pipeline draws with ``generator=torch.Generator().manual_seed(seed)`` and the same scheduler.

    Args:
        guidance: w in eps_null + w (eps_prompt - eps_null) (2207.12598), 1 or less predicts with the prompt only; or
            one w per image, a (steps, images) table, or a guider, ours or diffusers'.
        seeds: one per prompt.
        height, width: pixels, divisible by the VAE factor; None is the model's own.
        scheduler: a diffusers scheduler; None is the pipeline's. A copy is used.
        negative_prompts: one per prompt, instead of the pipeline's null prompt.
        eta: DDIM's share of fresh noise, for schedulers that have it; one number or one per step.
        inpaint: mask and masked-image latents (N, 1 + C, h, w) for inpainting models.
        latents: standard normal noise (N, C, h, w) to start from; None draws it from the seeds.
        alignment_strength: w in eps_ref + w (eps_policy - eps_ref), for all steps or one per step: 0 is the base
            model, 1 the trained policy, more goes beyond it. Other values than 0 and 1 cost both models' predictions.
        callback: called after every step.
        keep_trajectory: return the latents of every step.
        graph: (steps, N) bool, which predictions keep their graph to the weights, for the callback's ``Moment.x0``. No
            graph leads from one step to the next.
        copies: images come in runs of so many that are the same up to and including a step (one number for all
            steps or one per step): the step is predicted once for each run. ``batch_size`` must be a multiple.

    Raises:
        ValueError: numbers of prompts, seeds or negative prompts differ, a size the VAE cannot make, guidance that does
            not fit, another ``alignment_strength`` than 1 without trained weights, or ``copies`` across batches.
    """
    for name, values in (
        ("seeds", seeds),
        ("negative_prompts", negative_prompts),
        ("inpaint", inpaint),
        ("latents", latents),
    ):
        if values is not None and len(values) != len(prompts):
            raise ValueError(f"{name}: expected one for each of the {len(prompts)} prompts, found {len(values)}")
    factor = adapter.vae_scale_factor
    height, width = height or adapter.default_resolution, width or adapter.default_resolution
    if height % factor or width % factor:
        raise ValueError(f"images of {height}x{width} pixels cannot be made: both sides must be divisible by {factor}")
    strengths = _per_step("alignment_strength", alignment_strength, num_inference_steps)
    if any(value != 1 for value in strengths) and not adapter.has_reference:
        raise ValueError("alignment_strength other than 1 needs trained weights: load a LoRA, or train a policy")
    etas = _per_step("eta", eta, num_inference_steps)
    runs = [int(value) for value in _per_step("copies", copies, num_inference_steps)]
    if any(batch_size % run or len(prompts) % run for run in runs):
        raise ValueError(f"copies: batches of {batch_size} of {len(prompts)} images cut through runs of {max(runs)}")
    if graph is None:
        graph = torch.zeros(num_inference_steps, len(prompts), dtype=torch.bool)
    guider = as_guider(guidance)
    parts: list[Samples] = []
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        texts = list(prompts[start : rows.stop])
        cond = conditioning(adapter, texts, height, width, None if inpaint is None else inpaint[start : rows.stop])
        negative = [""] * len(rows) if negative_prompts is None else negative_prompts[start : rows.stop]
        run = _Run(
            adapter,
            guider if isinstance(guider, StepGuidance) else guider.new(),  # diffusers' guiders remember their last run
            copy.deepcopy(scheduler or adapter.pipeline.scheduler),
            texts,
            cond,
            conditioning(adapter, negative, height, width, cond.inpaint),
            rows,
            strengths,
            etas,
            graph[:, start : rows.stop],
            runs,
        )
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : rows.stop]]
        if latents is None:
            shape = (1, adapter.latent_channels, height // factor, width // factor)
            noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        else:
            noise = latents[start : rows.stop]
        parts.append(run.draw(noise, generators, callback, keep_trajectory))
    if not parts:
        nothing = torch.empty(0, adapter.latent_channels, height // factor, width // factor)
        return Samples(torch.empty(0, 3, height, width), nothing, torch.empty(num_inference_steps, 0), 0.0)
    paths = [part.trajectory for part in parts if part.trajectory is not None]
    return Samples(
        torch.cat([part.images for part in parts]),
        torch.cat([part.latents for part in parts]),
        torch.cat([part.scales for part in parts], dim=1),
        sum(part.nfe * len(part.images) for part in parts) / len(prompts),
        [record for part in parts for record in part.records],
        torch.cat(paths, dim=1) if paths else None,
    )


def _per_step(name: str, given: float | Sequence[float], steps: int) -> list[float]:
    values = [float(given)] * steps if isinstance(given, int | float) else [float(value) for value in given]
    if len(values) != steps:
        raise ValueError(f"{name}: expected one number or {steps}, one per step, found {len(values)}")
    return values


@dataclass
class _Run:
    """One batch on its way from noise to pictures."""

    adapter: Adapter
    guider: BaseGuidance
    scheduler: Any
    prompts: list[str]
    cond: Conditioning
    null: Conditioning
    rows: range
    strengths: list[float]
    etas: list[float]
    graph: Tensor
    copies: list[int]
    calls: int = 0

    def draw(
        self,
        noise: Tensor,
        generators: list[torch.Generator],
        callback: StepCallback | None,
        keep_trajectory: bool,
    ) -> Samples:
        adapter, scheduler = self.adapter, self.scheduler
        # Schedulers differ in what their steps take; a deterministic one has neither eta nor generator.
        accepted = inspect.signature(scheduler.step).parameters
        own_noise = "eta" in accepted and "variance_noise" in accepted
        extras: dict[str, Any] = {"generator": generators} if "generator" in accepted and not own_noise else {}
        # On the CPU: schedulers look things up by the timestep, and would ask the device for it at every step.
        scheduler.set_timesteps(len(self.strengths))
        times = send(scheduler.timesteps, adapter.device)
        levels = [Level.from_alpha_bar(signal) for signal in adapter.path.levels(scheduler).alpha_sq.tolist()]
        latents = send(noise, adapter.device) * scheduler.init_noise_sigma
        path = [latents] if keep_trajectory else []
        for step, t in enumerate(scheduler.timesteps):
            x_t = scheduler.scale_model_input(latents, t)
            view = StepView(
                step,
                len(scheduler.timesteps),
                x_t.float(),
                levels[step],
                levels[step + 1],
                self.cond,
                self.rows,
                adapter.path.output,
                adapter.decode,
                self.prompts,
            )
            with torch.set_grad_enabled(bool(self.graph[step].any())):
                output = self.guided(view, times[step])
                x0 = None if callback is None else view.clean(output)
            if "eta" in accepted:
                extras["eta"] = self.etas[step]
            if own_noise:  # drawn as DDIM would, which would wait for its copy to the device
                fresh = randn_tensor(output.shape, generators) if self.etas[step] else None
                extras["variance_noise"] = None if fresh is None else send(fresh, output.device)
            before, latents = latents, scheduler.step(output, t, latents, **extras, return_dict=False)[0]
            if callback is not None and x0 is not None:
                # Euler-like schedulers keep x0 + sigma eps and scale it for the denoiser; the others keep x_t.
                signal = 1.0 if hasattr(scheduler, "is_scale_input_called") else levels[step + 1].alpha
                moment = Moment(step + 1, before, latents, x0, signal, scheduler, self.cond, self.null, self.rows)
                replaced = callback(moment)
                latents = latents if replaced is None else replaced
            if keep_trajectory:
                path.append(latents)
        images = (adapter.decode(latents) / 2 + 0.5).clamp(0, 1).cpu()
        guider, records = self.guider, []
        scales = torch.empty(len(levels) - 1, 0)
        if isinstance(guider, StepGuidance):
            scales, records = torch.stack(guider.scales).float().cpu(), guider.records()
        trajectory = torch.stack(path).cpu() if keep_trajectory else None
        return Samples(images, latents.float().cpu(), scales, self.calls / len(self.prompts), records, trajectory)

    def guided(self, view: StepView, t: Tensor) -> Tensor:
        """The guider's combination of the predictions it asks for, (B, C, h, w)."""
        guider, strength = self.guider, self.strengths[view.step]
        if isinstance(guider, StepGuidance):
            guider.bind(view)
        guider.set_state(step=view.step, num_inference_steps=view.num_steps, timestep=t)
        branches = guider.prepare_inputs({"cond": (self.cond, self.null)})
        if type(guider).prepare_models is BaseGuidance.prepare_models:
            run = self.copies[view.step]
            conds = [branch.cond[::run] for branch in branches]
            both = conds[0] if len(conds) == 1 else Conditioning.cat(conds)
            with_graph = self.graph[view.step].view(-1, run).any(dim=1).repeat(len(conds))
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
        return combined

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

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, strength: float) -> Tensor:
        """Denoiser output of policy and reference, mixed by the alignment strength."""
        adapter, timesteps = self.adapter, t.expand(len(x_t))
        self.calls += len(x_t) * (1 if strength in (0, 1) else 2)
        if strength == 1:
            return adapter.predict(x_t, timesteps, cond).output
        with adapter.reference():
            reference = adapter.predict(x_t, timesteps, cond).output
        if strength == 0:
            return reference
        return reference + strength * (adapter.predict(x_t, timesteps, cond).output - reference)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Images (N, 3, H, W) in [0, 1] as pixels (N, H, W, 3) uint8."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
