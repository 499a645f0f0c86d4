"""ComfyUI's guider, with scales that a guider of diffusion-align chooses."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_sampling
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from diffusion_align.adapters import Conditioning
from diffusion_align.guidance.by_sigma import SigmaRun
from diffusion_align.guidance.guider import StepGuidance

log = logging.getLogger(__name__)


class StepGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance whose scale may differ from step to step and from picture to picture.

    Args:
        model: ComfyUI's MODEL.
        guidance: chooses the scales.
        prompt: text of the prompt, for judges that read it.
    """

    def __init__(self, model: Any, guidance: StepGuidance, prompt: str = "") -> None:
        super().__init__(model)
        self.guidance, self.prompt = guidance, prompt
        self.run: SigmaRun | None = None

    def sample(self, *args: Any, **named: Any) -> Any:
        """As ComfyUI's, whose guiders stay from one run to the next; logs the scales of each picture."""
        self.run = None
        self.guidance.reset()
        samples = super().sample(*args, **named)
        for number, record in enumerate(self.guidance.records() if self.guidance.scales else []):
            log.info("guidance of picture %d: %s", number, " ".join(f"{scale:g}" for scale in record["scales"]))
        return samples

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Any:
        """Guided clean latents (B, C, h, w), ComfyUI's "denoised", of ``x`` at sigma ``timestep`` (B,).

        As ``comfy.samplers.sampling_function``, with the patches of the model's options. The scales are chosen by what
        the model predicts, before patches change it.
        """
        options = model_options or {}
        model, positive, negative = self.inner_model, self.conds["positive"], self.conds["negative"]
        if self.run is None:
            self.run = self.begin(x, options["transformer_options"]["sample_sigmas"].tolist())
        self.guidance.bind(self.run.view(x, float(timestep[0])))
        two = self.guidance.num_conditions == 2
        conds = [positive, negative if two or options.get("disable_cfg1_optimization", False) else None]
        told = {"conds": conds, "input": x, "sigma": timestep, "model": model, "model_options": options}
        if "sampler_calc_cond_batch_function" in options:
            out = options["sampler_calc_cond_batch_function"](told)
        else:
            out = comfy.samplers.calc_cond_batch(model, conds, x, timestep, options)
        scale = as_comfyui_takes_it(self.guidance.choose(out[0], out[1] if two else None), x.ndim)
        for patch in options.get("sampler_pre_cfg_function", []):
            out = patch({**told, "conds_out": out, "cond_scale": scale, "timestep": timestep})
        return comfy.samplers.cfg_function(
            model, out[0], out[1], scale, x, timestep, model_options=options, cond=positive, uncond=conds[1]
        )

    def begin(self, x: Tensor, sigmas: list[float]) -> SigmaRun:
        """What guidance has to know of the run that ``x`` (B, C, h, w) begins."""
        first = self.conds["positive"][0]
        embeds = first.get("cross_attn", x.new_zeros(1, 0, 0))
        pooled = first.get("pooled_output") if "y" in first["model_conds"] else None  # else this model reads none

        def of_batch(given: Tensor) -> Tensor:
            repeated: Tensor = comfy.utils.repeat_to_batch_size(given, len(x))
            return repeated.to(x.device)

        return SigmaRun(
            sigmas,
            isinstance(self.inner_model.model_sampling, comfy.model_sampling.CONST),
            Conditioning(of_batch(embeds), None if pooled is None else of_batch(pooled)),
            [self.prompt] * len(x),
        )


def as_comfyui_takes_it(scales: Tensor, dimensions: int) -> float | Tensor:
    """Scales (B,) as a number, where all are the same, since patches may expect one; else (B, 1, 1, 1)."""
    first = float(scales[0])
    return first if torch.equal(scales, scales[:1].expand_as(scales)) else scales.view(-1, *[1] * (dimensions - 1))
