"""Guidance scales fixed in advance: as a function of the step or the noise level, or as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .guider import StepGuidance

#: Weight schedulers of 2404.13040: progress in [0, 1] (0 is pure noise) and power to a share of ``guidance_scale``.
SHAPES: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {
        "constant": lambda progress, power: 1.0,
        "linear": lambda progress, power: 2 * progress,
        "cosine": lambda progress, power: 1 - math.cos(math.pi * progress),
        "power": lambda progress, power: (power + 1) * progress**power,
    }
)


class ScheduleGuidance(StepGuidance):
    """A scale that depends on the step only.

    s = 1 + (guidance_scale - 1) shape, where the shapes rise from 0 and have mean 1 over the run (2404.13040, tab. 1):
    ``guidance_scale`` is the mean scale of each. At 1 or less the null prompt is not asked.

    Args:
        guidance_scale: mean scale; for "constant" the scale.
        schedule: key of ``SHAPES``.
        power: of the "power" schedule (2404.13040, sec. 4).
        sigma_low, sigma_high: guidance is on while sigma_low < sigma <= sigma_high and off (scale 1, no null
            prediction) elsewhere (limited interval, 2404.07724), sigma = sqrt((1 - alpha_bar) / alpha_bar).
        stop: share of the steps, from the first one on, that are guided; the others take the prompt's prediction alone,
            one call instead of two (Step AG, 2506.08351).

    Raises:
        ValueError: an unknown schedule, or ``stop`` outside of [0, 1].
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 5.0,
        schedule: str = "constant",
        power: float = 1.0,
        sigma_low: float = 0.0,
        sigma_high: float = math.inf,
        stop: float = 1.0,
    ) -> None:
        super().__init__(stop=stop)
        if schedule not in SHAPES:
            raise ValueError(f"guidance schedule {schedule!r}: expected one of {', '.join(SHAPES)}")
        self.guidance_scale, self.schedule, self.power = guidance_scale, schedule, power
        self.sigma_low, self.sigma_high = sigma_low, sigma_high

    def value(self) -> float:
        """Scale of the bound step."""
        view = self.view
        assert view is not None
        if self.stopped():
            return 1.0
        signal = view.now.alpha_sq  # 0 at the start of a schedule with zero terminal SNR
        sigma = math.sqrt(view.now.sigma_sq / signal) if signal else math.inf
        if not self.sigma_low < sigma <= self.sigma_high:
            return 1.0
        progress = (view.step + 0.5) / view.num_steps
        return 1 + (self.guidance_scale - 1) * SHAPES[self.schedule](progress, self.power)

    def wants_null(self) -> bool:
        return self.view is None or self.value() > 1

    def preset(self) -> Tensor:
        return torch.tensor([self.value()])

    def scale(self, pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
        return torch.full((len(pred_cond),), self.value())


class TableGuidance(StepGuidance):
    """A scale per step, per image, or both: a list someone wrote, or the record of an earlier run.

    Args:
        table: (steps,) numbers for all images; or (steps, images).
        per_image: ``table`` is (images,) numbers, constant over the steps.
        branches: per step, whether it takes the null prompt's prediction (2) or not (1), as an earlier run did: a
            scale of 1 gives the same image, but not the same last bit, with and without it. None: where it is needed.
        stop: share of the steps that are guided, as of :class:`ScheduleGuidance`.

    Raises:
        ValueError: ``stop`` outside of [0, 1]; a table that is no such list, or (at the first step) has not the run's
            steps and images.
    """

    @register_to_config
    def __init__(
        self,
        table: Sequence[Any],
        per_image: bool = False,
        branches: Sequence[int] | None = None,
        stop: float = 1.0,
    ) -> None:
        super().__init__(stop=stop)
        try:
            values = torch.tensor(table, dtype=torch.float32)
        except (TypeError, ValueError):
            values = torch.empty(0)
        if values.ndim not in ((1,) if per_image else (1, 2)) or not values.numel() or not values.isfinite().all():
            raise ValueError("guidance table: expected numbers, a list per step or a list of lists (steps x images)")
        self.values = values[None] if per_image else values.view(len(values), -1)
        self.per_image = per_image
        self._branches = None if branches is None else list(branches)

    def wants_null(self) -> bool:
        if self.view is not None and self._branches is not None and not self.stopped():
            return self._branches[self.view.step] == 2
        return self.view is None or bool((self.row() > 1).any())

    def row(self) -> Tensor:
        """Scales (B,) or (1,) of the bound step."""
        view = self.view
        assert view is not None
        steps, images = self.values.shape
        if not self.per_image and steps != view.num_steps:
            raise ValueError(f"guidance table: it has {steps} steps, the run {view.num_steps}")
        if images != 1 and view.rows.stop > images:
            raise ValueError(f"guidance table: it has scales for {images} images, the run has more")
        if self.stopped():
            return torch.ones(1)
        row = self.values[0 if self.per_image else view.step]
        return row if images == 1 else row[view.rows.start : view.rows.stop]

    def preset(self) -> Tensor:
        return self.row()

    def scale(self, pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
        return self.row().expand(len(pred_cond))

    @classmethod
    def from_record(cls, path: str | Path) -> TableGuidance:
        """The schedule that ``generate`` wrote beside a picture: a JSON file with "scales", one per step.

        Raises:
            FileNotFoundError, ValueError: no such file, or no schedule in it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a JSON record that generate wrote")
        try:
            record = json.loads(path.read_text())
            return cls(record["scales"], branches=record.get("branches"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a JSON object with a list 'scales', one per step ({error})") from None


def as_guider(guidance: Any) -> Any:
    """A guider from what users write: a guider as it is, a number, or a (images,) / (steps, images) table.

    Raises:
        ValueError: none of these.
    """
    if isinstance(guidance, bool) or guidance is None:
        raise ValueError(f"guidance = {guidance!r}: expected a number, a table or a guider")
    if isinstance(guidance, int | float):
        return ScheduleGuidance(float(guidance))
    if isinstance(guidance, Tensor | list | tuple):
        table = torch.as_tensor(guidance, dtype=torch.float32)
        return TableGuidance(table.tolist(), per_image=table.ndim == 1)
    return guidance
