"""A learned schedule: the scale follows from the noise level and from how far prompt and null prompt disagree."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusion_align.files import read_object, write_whole
from diffusion_align.process import log_snr

from .guider import StepGuidance, StepView

#: What a file is, in its field "kind".
KIND = "annealing schedule"
#: Noise levels beyond these, in log-SNR, count as these: a schedule with zero terminal SNR starts at minus infinity.
LOWEST, HIGHEST = -10.0, 10.0


@dataclass(frozen=True)
class AnnealingSchedule:
    """s(t, |delta|) = low (high / low)^sigmoid(w2 tanh(w1 z + b1) + b2), after 2506.24108's w(t, |delta_t|).

    z are log-SNR and log |delta|, standardised; |delta| is the root mean square of eps_prompt - eps_null.

    Attributes:
        low, high: the scale lies between these.
        mean, std: (2,) of log-SNR and log |delta|.
        w1, b1, w2, b2: (H, 2), (H,), (H,) and (), float32 or float64.
    """

    low: float
    high: float
    mean: Tensor
    std: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __call__(self, level: Tensor, delta: Tensor) -> Tensor:
        """Scales (B,) at log-SNR ``level`` (B,) and |delta| ``delta`` (B,)."""
        state = torch.stack([level.clamp(LOWEST, HIGHEST), delta.clamp(min=1e-12).log()], dim=1).to(self.w1)
        share = share_of_range((state - self.mean) / self.std, self.w1, self.b1, self.w2, self.b2)
        return self.low * (self.high / self.low) ** share

    def to(self, like: Tensor) -> AnnealingSchedule:
        """On the device and of the dtype of ``like``."""
        tensors = (each.to(like) for each in (self.mean, self.std, self.w1, self.b1, self.w2, self.b2))
        return AnnealingSchedule(self.low, self.high, *tensors)

    def save(self, file: str | Path) -> Path:
        """Write a JSON file; returns it."""
        values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        write_whole(Path(file), json.dumps({"kind": KIND, **values}, indent=2).encode() + b"\n")
        return Path(file)

    @classmethod
    def load(cls, file: str | Path) -> AnnealingSchedule:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file, or no schedule in it.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; expected what 'evaluate guidance --fit' wrote")
        content = read_object(file)
        if content.get("kind") != KIND:
            raise ValueError(f"{file}: expected kind {KIND!r}, found {content.get('kind')!r}")
        try:
            low, high = float(content["low"]), float(content["high"])
            tensors = [torch.tensor(content[name]) for name in ("mean", "std", "w1", "b1", "w2", "b2")]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: no schedule ({type(error).__name__}: {error})") from None
        width = len(tensors[3]) if tensors[3].ndim else 0
        shapes = [(2,), (2,), (width, 2), (width,), (width,), ()]
        fits = all(
            tensor.shape == shape and tensor.isfinite().all() for tensor, shape in zip(tensors, shapes, strict=True)
        )
        if not fits or not 0 < low < high < math.inf or not width or not (tensors[1] > 0).all():
            raise ValueError(f"{file}: its weights do not fit each other, or are not finite")
        return cls(low, high, *tensors)


def share_of_range(z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Where between the lowest and the highest scale, in (0, 1), (B,), for standardised states z (B, 2)."""
    return ((z @ w1.T + b1).tanh() @ w2 + b2).sigmoid()


def disagreement(view: StepView, pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
    """|delta| (B,) float32: root mean square of eps_prompt - eps_null, whatever the model predicts."""
    eps = [view.now.eps(view.x_t, view.clean(output.float())) for output in (pred_cond, pred_uncond)]
    return (eps[0] - eps[1]).square().mean(dim=(1, 2, 3)).sqrt()


def level_of(view: StepView) -> float:
    """Log-SNR of the step, between ``LOWEST`` and ``HIGHEST``."""
    return float(log_snr(torch.tensor(view.now.preserving().alpha_sq)).clamp(LOWEST, HIGHEST))


class AnnealingGuidance(StepGuidance):
    """The scale that a learned schedule gives each image at each step.

    Args:
        schedule: file of an :class:`AnnealingSchedule`, as ``evaluate guidance --fit`` writes it; None: ``use`` one.
        stop: share of the steps, from the first one on, that are guided, as of ``ScheduleGuidance``.

    Raises:
        ValueError: ``stop`` outside of [0, 1]; in a run, there is no schedule.
        FileNotFoundError: in a run, no such file.
    """

    @register_to_config
    def __init__(self, schedule: str | None = None, stop: float = 1.0) -> None:
        super().__init__(stop=stop)
        self._file = schedule
        self._schedule: AnnealingSchedule | None = None

    def use(self, schedule: AnnealingSchedule) -> AnnealingGuidance:
        """Take this one instead of loading a file."""
        self._schedule = schedule
        return self

    def bind(self, view: StepView) -> None:
        super().bind(view)
        if self._schedule is None:
            if self._file is None:
                raise ValueError("annealing guidance needs a schedule: AnnealingGuidance(FILE), or use(schedule)")
            self._schedule = AnnealingSchedule.load(self._file)

    def wants_null(self) -> bool:
        return not self.stopped()

    def scale(self, pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
        view, schedule = self.view, self._schedule
        assert view is not None
        assert schedule is not None
        delta = disagreement(view, pred_cond, pred_uncond)
        self._schedule = schedule.to(delta)  # kept, so that only the first step moves it
        return self._schedule(torch.full_like(delta, level_of(view)), delta)
