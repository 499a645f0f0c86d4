"""What a caller may see and change between the sampler's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.guidance.guider import StepView


@dataclass(frozen=True)
class Moment:
    """A batch between two steps, as a callback sees it.

    Attributes:
        step: how many of the steps that were asked for are done. Second-order schedulers call the denoiser more often
            than that (``process.model_calls``); nobody is called within a step.
        before: (B, C, h, w), what the step started from, in the scheduler's own scaling.
        latents: (B, C, h, w) likewise, what the next step starts from.
        x0: (B, C, h, w), the step's last prediction of the clean latents; with a graph where ``sample`` was asked for
            one.
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


@dataclass(frozen=True)
class GuidedStep:
    """What a guider made of a step's predictions, for whoever measures it.

    Attributes:
        view: the step.
        output: (B, C, h, w), the guider's combination.
        plain: predicts with prompt and null prompt as classifier-free guidance would, by the run's model or the one
            that it is given, each (B, C, h, w) and without a graph; these calls are not counted as the run's.
    """

    view: StepView
    output: Tensor
    plain: Callable[[Adapter | None], tuple[Tensor, Tensor]]


#: Called after every combination of predictions.
GuidedCallback: TypeAlias = Callable[[GuidedStep], None]

#: Called after every step; latents (B, C, h, w) that it returns replace the step's.
StepCallback: TypeAlias = Callable[[Moment], Tensor | None]


@dataclass(frozen=True)
class SkippedLayers:
    """Skip-layer guidance (SD3.5 medium): what two predictions are combined to moves on by ``scale`` (v - v_skipped),
    where v_skipped is the prompt's prediction v by the network without some of its blocks; one call more in such steps.

    Attributes:
        layers: numbers of these blocks.
        start, stop: shares of the steps, between which it is done: start N < step < stop N, as in diffusers' pipeline.
    """

    layers: tuple[int, ...]
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def at(self, step: int, steps: int) -> bool:
        """Whether it is done in ``step`` (from 0) of ``steps``."""
        return self.start * steps < step < self.stop * steps

    def check(self, adapter: Adapter, steps: int) -> None:
        """Whether the model has the blocks, and some of ``steps`` are guided so.

        Raises:
            ValueError: not.
        """
        blocks = adapter.family.skippable
        if blocks is None:
            raise ValueError(
                "skip_guidance_layers is for SD3 and SD3.5, whose network can leave out blocks: a "
                f"{adapter.family.name} model's network cannot, leave it unset"
            )
        count = len(getattr(adapter.network, blocks))
        if not all(0 <= layer < count for layer in self.layers):
            raise ValueError(f"skip_guidance_layers {list(self.layers)}: this network has blocks 0 to {count - 1}")
        if not any(self.at(step, steps) for step in range(steps)):
            raise ValueError(
                f"skip_guidance_layers would be used in none of the {steps} steps: none lies between "
                f"skip_layer_guidance_start {self.start:g} and skip_layer_guidance_stop {self.stop:g} of them"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What few callers of :func:`~diffusion_align.sampling.sampler.sample` change.

    Values per step have one entry for each step that is asked for, whatever the scheduler.

    Attributes:
        height, width: pixels, divisible by the VAE factor; None is the model's own.
        batch_size: pictures drawn at once; it changes none of them.
        alignment_strength: w in eps_ref + w (eps_policy - eps_ref), for all steps or one per step: 0 is the base
            model, 1 the trained policy, more goes beyond it. Other values than 0 and 1 cost both models' predictions.
        callback: called after every step.
        on_guided: called after every combination of predictions, to measure guiders.
        on_pictures: called when a batch is done, with its positions among all images and its pixels (B, 3, H, W).
        keep_trajectory: return the latents of every step.
        latents: standard normal noise (N, C, h, w) to start from; None draws it from the seeds.
        graph: (steps, N) bool, which predictions keep their graph to the weights, for the callback's ``Moment.x0``;
            None keeps none. No graph leads from one step to the next.
        embedded_guidance: of models that take the guidance scale as an input (FLUX dev): the scale that they are given
            while ``guidance`` combines two predictions (true guidance, twice the cost); None gives them ``guidance``.
        skipped_layers: skip-layer guidance; None: none.
        copies: images come in runs of this many that are equal up to and including a step (one number for all
            steps or one per step): the step is predicted once for each run. ``batch_size`` must be a multiple.
    """

    height: int | None = None
    width: int | None = None
    batch_size: int = 16
    alignment_strength: float | Sequence[float] = 1.0
    callback: StepCallback | None = None
    on_guided: GuidedCallback | None = None
    on_pictures: Callable[[range, Tensor], None] | None = None
    keep_trajectory: bool = False
    latents: Tensor | None = None
    graph: Tensor | None = None
    copies: int | Sequence[int] = 1
    embedded_guidance: float | None = None
    skipped_layers: SkippedLayers | None = None


#: Nothing changed.
PLAIN = SamplingOptions()


@dataclass(frozen=True)
class StepPlan:
    """What is done at each step of a run of N images.

    Attributes:
        etas: DDIM's share of fresh noise.
        strengths: alignment strengths.
        copies: runs of this many images are equal.
        graph: (steps, N) bool, which predictions keep their graph.
        two_branches: whether prompts may be combined with null prompts; else the network is given the scale, or none.
        on_guided: called after every combination of predictions.
        skipped: skip-layer guidance.
    """

    etas: list[float]
    strengths: list[float]
    copies: list[int]
    graph: Tensor
    two_branches: bool = True
    on_guided: GuidedCallback | None = None
    skipped: SkippedLayers | None = None

    @classmethod
    def make(
        cls,
        steps: int,
        images: int,
        eta: float | Sequence[float],
        options: SamplingOptions,
        two_branches: bool = True,
    ) -> StepPlan:
        """The plan of ``options``.

        Raises:
            ValueError: as many values as neither 1 nor ``steps``, or batches that cut through runs of copies.
        """
        strengths = _per_step("alignment_strength", options.alignment_strength, steps)
        etas = _per_step("eta", eta, steps)
        runs = [int(value) for value in _per_step("copies", options.copies, steps)]
        batch = options.batch_size
        if any(batch % run or images % run for run in runs):
            raise ValueError(f"copies: batches of {batch} of {images} images cut through runs of {max(runs)}")
        graph = torch.zeros(steps, images, dtype=torch.bool) if options.graph is None else options.graph
        return cls(etas, strengths, runs, graph, two_branches, options.on_guided, options.skipped_layers)


def _per_step(name: str, given: float | Sequence[float], steps: int) -> list[float]:
    values = [float(given)] * steps if isinstance(given, int | float) else [float(value) for value in given]
    if len(values) != steps:
        raise ValueError(f"{name}: expected one number or {steps}, one per step, found {len(values)}")
    return values
