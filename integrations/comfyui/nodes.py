"""The nodes: each makes a GUIDER, which SamplerCustomAdvanced takes in place of that of ComfyUI's CFGGuider."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from diffusion_align.files import read_object
from diffusion_align.guidance.annealing import KIND, AnnealingGuidance, AnnealingSchedule
from diffusion_align.guidance.dynamic import WEIGHTINGS, DynamicGuidance
from diffusion_align.guidance.guider import StepGuidance
from diffusion_align.guidance.judges.judge import PUBLISHED, load_judge
from diffusion_align.guidance.schedules import SHAPES, ScheduleGuidance, TableGuidance

from .guiders import StepGuider

#: What every guider of ComfyUI takes.
GUIDED = {"model": ("MODEL",), "positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}


def number(default: float, most: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    """A field for a number."""
    return ("FLOAT", {"default": default, "min": 0.0, "max": most, "step": 0.01, "tooltip": tooltip})


def text(default: str, tooltip: str) -> tuple[str, dict[str, Any]]:
    """A field for a line."""
    return ("STRING", {"default": default, "tooltip": tooltip})


class GuiderNode:
    """What ComfyUI asks of each of these nodes."""

    RETURN_TYPES = ("GUIDER",)
    FUNCTION = "guider"
    CATEGORY = "sampling/custom_sampling/guiders"

    def made(self, model: Any, positive: Any, negative: Any, guidance: StepGuidance, prompt: str = "") -> tuple[Any]:
        """The node's output."""
        guider = StepGuider(model, guidance, prompt)
        guider.set_conds(positive, negative)
        return (guider,)


class ScheduledGuider(GuiderNode):
    """A scale by the step and by the noise level."""

    DESCRIPTION = "Guidance that grows over the run, or is on within an interval of noise levels only."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                **GUIDED,
                "guidance_scale": number(5.0, 100.0, "mean scale over the run"),
                "schedule": (list(SHAPES), {"tooltip": "how the scale grows from 1 on; constant: it does not"}),
                "power": number(1.0, 20.0, "of the schedule power"),
                "sigma_low": number(0.0, 1e4, "guided above this sigma only"),
                "sigma_high": number(0.0, 1e4, "guided up to this sigma only; 0: up to any"),
                "stop": number(
                    1.0, 1.0, "share of the steps, from the first one on, that are guided; the rest costs half"
                ),
            }
        }

    def guider(self, model: Any, positive: Any, negative: Any, sigma_high: float, **settings: Any) -> tuple[Any]:
        """Raises ``ValueError``: wrong settings."""
        guidance = ScheduleGuidance(**settings, sigma_high=sigma_high or math.inf)
        return self.made(model, positive, negative, guidance)


class SavedScheduleGuider(GuiderNode):
    """The scales of a file."""

    DESCRIPTION = "Repeats the scales of a picture's record, or takes a schedule that was learned from rollouts."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = "the .json that generate wrote beside a picture, or the file of 'evaluate guidance --fit'"
        return {"required": {**GUIDED, "file": text("", files)}}

    def guider(self, model: Any, positive: Any, negative: Any, file: str) -> tuple[Any]:
        """Raises ``FileNotFoundError`` or ``ValueError``: no such file, or no schedule in it."""
        return self.made(model, positive, negative, saved_guidance(Path(file.strip())))


class DynamicGuider(GuiderNode):
    """The scale that a judge of latents likes best, for each picture at each step."""

    DESCRIPTION = "At each step every picture goes on with the candidate scale that the evaluator likes best."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        read = "the prompt as text, for judges that read it: latent-clip and lrm"
        return {
            "required": {
                **GUIDED,
                "evaluator": text("", "folder that 'train evaluator' wrote; latent-clip:PATH; lrm:FOLDER"),
                "kinds": text("alignment, preference", "which of its judgements count"),
                "candidates": text("2.5, 3.5, 5", "scales to choose from: around the best static one"),
                "weighting": (list(WEIGHTINGS), {"tooltip": "how judgements are weighted"}),
                "normalise": (["candidates", "population"], {"tooltip": "over what scores are standardised"}),
                "start": number(0.0, 1.0, "share of the steps before the search begins"),
                "stop": number(1.0, 1.0, "share of the steps after which it ends"),
                "fallback": number(3.5, 100.0, "scale outside of the search"),
            },
            "optional": {"prompt": ("STRING", {"default": "", "multiline": True, "tooltip": read})},
        }

    def guider(
        self, model: Any, positive: Any, negative: Any, evaluator: str, kinds: str, candidates: str, prompt: str = "",
        **settings: Any,
    ) -> tuple[Any]:  # fmt: skip
        """Raises ``FileNotFoundError`` or ``ValueError``: no evaluator, wrong settings, or several prompts."""
        evaluator = evaluator.strip()
        if len(positive) != 1:
            raise ValueError(f"positive: expected one prompt for the evaluator to judge by, found {len(positive)}")
        if evaluator.partition(":")[0] in PUBLISHED and not prompt.strip():
            raise ValueError(f"prompt: {evaluator} reads the prompt as text; write it here, too")
        guidance = DynamicGuidance(evaluator, listed(kinds), numbers(candidates), **settings)
        guidance.use(load_judge(evaluator))  # here, so that what is wrong with it is said before pictures are drawn
        return self.made(model, positive, negative, guidance, prompt)


def saved_guidance(file: Path) -> StepGuidance:
    """What ``file`` holds: a learned schedule, or the record of a picture.

    Raises:
        FileNotFoundError, ValueError: no such file, or neither.
    """
    if file.is_file() and read_object(file).get("kind") == KIND:
        return AnnealingGuidance().use(AnnealingSchedule.load(file))
    return TableGuidance.from_record(file)


def listed(line: str) -> list[str]:
    """The words of a line, with commas or spaces between them."""
    return line.replace(",", " ").split()


def numbers(line: str) -> list[float]:
    """The numbers of a line.

    Raises:
        ValueError: something else in it.
    """
    try:
        return [float(word) for word in listed(line)]
    except ValueError as error:
        raise ValueError(f"candidates {line!r}: expected numbers with commas between them ({error})") from None


NODE_CLASS_MAPPINGS = {
    "DiffusionAlignScheduledGuider": ScheduledGuider,
    "DiffusionAlignSavedScheduleGuider": SavedScheduleGuider,
    "DiffusionAlignDynamicGuider": DynamicGuider,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DiffusionAlignScheduledGuider": "Scheduled guidance (diffusion-align)",
    "DiffusionAlignSavedScheduleGuider": "Saved guidance schedule (diffusion-align)",
    "DiffusionAlignDynamicGuider": "Dynamic guidance (diffusion-align)",
}
