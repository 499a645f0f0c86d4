"""Our guiders in samplers that know a step by its noise level only, as k-diffusion's do, and ComfyUI's after them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffusion_align.adapters import Conditioning
from diffusion_align.process import OUTPUTS, Level, StraightLevel

from .guider import StepView

#: How far, relatively, a sampler's noise level may lie above the run's own and still count as it: rounding.
ROUNDING = 1e-4


@dataclass
class SigmaRun:
    """One run of such a sampler. The model's predictions are clean latents x0 (k-diffusion's ``denoised``).

    Attributes:
        sigmas: N + 1 noise levels of the N steps, from noise to picture: of latents x0 + sigma eps, or
        straight: of (1 - sigma) x0 + sigma eps, as flow matching has them.
        cond: conditioning of the prompts (B), for judges.
        prompts: B, for judges that read text.
        opened: the step of the last call; -1 before the first.

    Raises:
        ValueError: fewer than two noise levels, or levels that rise.
    """

    sigmas: Sequence[float]
    straight: bool
    cond: Conditioning
    prompts: list[str]
    opened: int = -1

    def __post_init__(self) -> None:
        falls = all(now >= after for now, after in zip(self.sigmas, self.sigmas[1:], strict=False))
        if len(self.sigmas) < 2 or not falls:
            raise ValueError(
                "guidance by the step needs at least two noise levels that fall from step to step, found "
                + " ".join(f"{sigma:g}" for sigma in self.sigmas)
            )

    def view(self, x: Tensor, sigma: float) -> StepView:
        """The step of a call of the model with latents ``x`` (B, C, h, w) at ``sigma``.

        A call belongs to the step whose noise levels it lies between, and the first one there opens it. A sampler that
        looks at its next noise level within a step (Heun) opens the next one by that.
        """
        step = self.step(sigma)
        again, self.opened = step == self.opened, step
        now = self.level(sigma)
        return StepView(
            step,
            len(self.sigmas) - 1,
            (x if self.straight else now.alpha * x).float(),
            now,
            self.level(self.sigmas[step + 1]),
            self.cond,
            range(len(x)),
            OUTPUTS["sample"],
            undecodable,
            self.prompts,
            again,
        )

    def step(self, sigma: float) -> int:
        """The step, from 0, that ``sigma`` lies in."""
        reached = bisect_right(self.sigmas, -sigma * (1 - ROUNDING), key=lambda level: -level)
        return min(max(reached - 1, 0), len(self.sigmas) - 2)

    def level(self, sigma: float) -> Level[float]:
        """How much image and noise the denoiser is shown at ``sigma``."""
        return StraightLevel.from_sigma(sigma) if self.straight else Level.from_alpha_bar(1 / (1 + sigma**2))


def undecodable(latents: Tensor) -> Tensor:
    """Raises ``ValueError``: such a sampler has no decoder at hand."""
    raise ValueError("pixel_scorers need decoded pictures, which a sampler by noise levels has not: use an evaluator")
