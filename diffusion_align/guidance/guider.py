"""What our guiders share: diffusers' interface, and a look at the step that they guide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from diffusion_align.adapters import Conditioning
from diffusion_align.adapters.autoencoder import LatentSpace
from diffusion_align.devices import send
from diffusion_align.process import Level, Output
from diffusion_align.quiet import unsaid

#: Says at every construction of a guider that guiders are experimental.
EXPERIMENTAL = "diffusers.guiders.guider_utils"
#: Why it cannot be guided otherwise.
DISTILLED = (
    "but this model was distilled: it takes the guidance scale as an input (unet: time_cond_proj_dim, FLUX: "
    "guidance_embeds) and needs a number, a table or a schedule"
)
#: Why it cannot be guided at all.
UNGUIDED = (
    "this model was distilled to need no guidance (FLUX schnell): set the guidance scale to 1, or give negative "
    "prompts for guidance by two predictions"
)


@dataclass(frozen=True)
class StepView:
    """One sampling step of a batch, as a guider sees it before it combines the predictions.

    Attributes:
        step: number of the step, from 0; ``num_steps`` of them, as many as were asked for.
        x_t: (B, C, h, w) float32, the latents that the denoiser is given: of its path, variance-preserving or straight.
        now, after: how much image and noise there is in the latents, before and after the step.
        cond: conditioning of the prompts (B).
        rows: positions of the batch among all images of the run, so that values per image find their own.
        output: what the denoiser predicts.
        decode: latents (B, C, h, w) to pixels (B, 3, H, W), about [-1, 1].
        prompts: B.
        again: whether this is a further call of the denoiser in the same step, as Heun's and PNDM's schedulers make
            (``process.model_calls``); ``now`` is where the call is, ``after`` where the step ends.
        space: says which latents these are; None: nobody knows.
    """

    step: int
    num_steps: int
    x_t: Tensor
    now: Level[float]
    after: Level[float]
    cond: Conditioning
    rows: range
    output: Output
    decode: Callable[[Tensor], Tensor]
    prompts: list[str]
    again: bool = False
    space: Callable[[], LatentSpace] | None = None

    def clean(self, output: Tensor) -> Tensor:
        """x0 of a denoiser output for ``x_t``; affine in the output."""
        return self.output.x0(output, self.x_t, self.now)

    def ahead(self, output: Tensor) -> Tensor:
        """The latents that one deterministic DDIM step along ``output`` leads to; affine in the output."""
        x0 = self.clean(output)
        return self.after.noise(x0, self.now.eps(self.x_t, x0))

    def judged(self, output: Tensor) -> Tensor:
        """``ahead`` as latents of a variance-preserving path, which judges of noisy latents know; affine in the output,
        too."""
        return self.after.rescaled(self.ahead(output))


class StepGuidance(BaseGuidance, ABC):
    """A guider of the prompt's and the null prompt's predictions that is shown each step (``bind``) first.

    Works in :func:`diffusion_align.sampling.sampler.sample` and in diffusers' modular pipelines
    (:mod:`diffusion_align.guidance.modular`). A step has one scale per image, chosen in its first call of the denoiser:
    further calls, of second-order schedulers, only refine the same step.

    Attributes:
        scales: the scales of each step so far, (B,) each; emptied when a run starts.
        branches: how many predictions each step so far was combined from, 1 (the prompt's) or 2.
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]

    def __init__(self, start: float = 0.0, stop: float = 1.0, enabled: bool = True) -> None:
        with unsaid(EXPERIMENTAL):
            super().__init__(start, stop, enabled)
        self.view: StepView | None = None
        self.scales: list[Tensor] = []
        self.branches: list[int] = []

    def bind(self, view: StepView) -> None:
        """Show the guider the step; a run's first step makes it forget the run before."""
        if view.step == 0 and not view.again:
            self.reset()
        self.view = view

    def stopped(self) -> bool:
        """Whether the bound step comes after the first ``stop`` of the steps, which alone are guided."""
        view = self.view
        return view is not None and view.step >= round(self._stop * view.num_steps)

    def reset(self) -> None:
        """Forget an earlier run."""
        self.scales, self.branches = [], []

    def records(self) -> list[dict[str, Any]]:
        """What was chosen in the run, as JSON, one object per image: "scales" and "branches", one per step."""
        columns = torch.stack(self.scales, dim=1).tolist()
        return [{"scales": column, "branches": list(self.branches)} for column in columns]

    @abstractmethod
    def scale(self, pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
        """Guidance scales (B,) of this step."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """pred_uncond + s (pred_cond - pred_uncond) (2207.12598), s per image."""
        scale = self.choose(pred_cond, pred_uncond)
        if pred_uncond is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        weight = scale.view(-1, *[1] * (pred_cond.ndim - 1))
        pred = pred_uncond + weight * (pred_cond - pred_uncond)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def choose(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Tensor:
        """The bound step's scales (B,), which are noted; further calls of the denoiser take those of the first."""
        if self.view is None or not self.view.again:
            self.branches.append(1 if pred_uncond is None else 2)
            self.scales.append(self._chosen(pred_cond, pred_uncond))
        return self.scales[-1]

    def _chosen(self, pred_cond: Tensor, pred_uncond: Tensor | None) -> Tensor:
        """The step's scales (B,), like the predictions; 1 where the null prompt is not asked."""
        if pred_uncond is None:
            return pred_cond.new_ones(len(pred_cond))
        return send(self.scale(pred_cond, pred_uncond), pred_cond.device).to(pred_cond.dtype)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        if self.view is not None and self.view.again:
            return self.branches[-1]
        return 2 if self.wants_null() else 1

    @abstractmethod
    def wants_null(self) -> bool:
        """Whether the coming step needs the null prompt's prediction at all."""

    def preset(self) -> Tensor | None:
        """The bound step's scales, (B,) or (1,), where they do not depend on predictions; else None."""
        return None

    def embedded(self, batch: int) -> Tensor:
        """The bound step's scales (B,) float32, for a network that takes them as an input; they are noted.

        Raises:
            ValueError: they are chosen by predictions.
        """
        view, scales = self.view, self.preset()
        if view is None or scales is None:
            raise ValueError(f"{type(self).__name__} combines predictions of prompt and null prompt, {DISTILLED}")
        scales = scales.expand(batch)
        if len(self.scales) == view.step:
            self.scales.append(scales)
            self.branches.append(1)
        return scales

    def prepare_inputs(self, data: Any) -> list[Any]:
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, i, name) for i, name in enumerate(names)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in enumerate(names)]
