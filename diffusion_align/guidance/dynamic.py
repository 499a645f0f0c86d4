"""Dynamic classifier-free guidance (2509.16131): at every step each image gets the scale that evaluators like best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusion_align.devices import send
from diffusion_align.process import log_snr
from diffusion_align.rewards import RewardScorer, load_scorer

from .guider import StepGuidance, StepView
from .judges.judge import LatentJudge, check_kinds, check_latents, load_judge

#: Smallest |score| that an improvement is measured against, in standard deviations.
GUARD = 0.1

#: Weights (E, B), from the standardised scores of what was chosen at earlier steps ([(E, B), ...]) and the progress
#: in [0, 1).
Weighting = Callable[[list[Tensor], float, int, int], Tensor]


def uniform(history: list[Tensor], progress: float, evaluators: int, batch: int) -> Tensor:
    """The same for all evaluators and steps."""
    return torch.full((evaluators, batch), 1 / evaluators)


def linear(history: list[Tensor], progress: float, evaluators: int, batch: int) -> Tensor:
    """From the first evaluator at the start to the last one at the end, linearly through those between."""
    position = progress * (evaluators - 1)
    weights = (1 - (torch.arange(evaluators) - position).abs()).clamp(min=0)
    return (weights / weights.sum())[:, None].expand(evaluators, batch)


def improvement(history: list[Tensor], guard: float) -> Tensor:
    """(e_now - e_before) / |e_before| of the last two choices (E, B)."""
    before, now = history[-2], history[-1]
    return (now - before) / before.abs().clamp(min=guard)


def adaptive(history: list[Tensor], progress: float, evaluators: int, batch: int) -> Tensor:
    """An evaluator counts while its score still improves: relative improvement, never negative, sum 1."""
    if len(history) < 2:
        return uniform(history, progress, evaluators, batch)
    gains = improvement(history, GUARD).clamp(min=0)
    total = gains.sum(dim=0)
    return torch.where(total > 0, gains / total.clamp(min=1e-12), torch.full_like(gains, 1 / evaluators))


def adaptive_signed(history: list[Tensor], progress: float, evaluators: int, batch: int) -> Tensor:
    """The paper's rule as printed: relative improvement with its sign, not normalised."""
    if len(history) < 2:
        return uniform(history, progress, evaluators, batch)
    before, now = history[-2], history[-1]
    return (now - before) / torch.where(before.abs() < 1e-6, torch.full_like(before, 1e-6), before)


WEIGHTINGS: Mapping[str, Weighting] = MappingProxyType(
    {"uniform": uniform, "linear": linear, "adaptive": adaptive, "adaptive-signed": adaptive_signed}
)


class DynamicGuidance(StepGuidance):
    """Greedy search over guidance scales, per image and step, at no more denoiser calls than static guidance.

    Every candidate's next latents x^s = x^0 + s (x^1 - x^0) (a DDIM step is affine in the scale) are scored, and the
    image continues with argmax_s sum_i w_i z(e_i(x^s)).

    Args:
        evaluator: shipped name or folder of a :class:`~.evaluators.LatentEvaluator`, or a published judge:
            "latent-clip", "latent-clip:PATH", "lrm:FOLDER"; None if only pixel scorers judge.
        kinds: which of its judgements count.
        candidates: the scales, around the best static one: with far ones the greedy choice is often wrong.
        weighting: how the evaluators are weighted: "uniform" (default), "linear", "adaptive" or "adaptive-signed".
        normalise: "population": scores are standardised with the evaluator's statistics of the noise level;
            "candidates": over the candidates of each image, so that all evaluators count the same.
        pixel_scorers: names of scorers that judge the decoded x0 predictions. Expensive: one decoding per candidate.
        start, stop: the part of the run, in [0, 1], that is searched; elsewhere the scale is ``fallback``.
        fallback: the scale outside of [start, stop).

    Raises:
        ValueError: an unknown weighting or normalisation, no candidates, or nothing to judge with.
    """

    @register_to_config
    def __init__(
        self,
        evaluator: str | None = "scenes-sdxl-evaluator",
        kinds: Sequence[str] = ("alignment", "preference"),
        candidates: Sequence[float] = (2.5, 3.5, 5.0),
        weighting: str = "uniform",
        normalise: str = "candidates",
        pixel_scorers: Sequence[str] = (),
        start: float = 0.0,
        stop: float = 1.0,
        fallback: float = 3.5,
    ) -> None:
        super().__init__(start, stop)
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting {weighting!r}: expected one of {', '.join(WEIGHTINGS)}")
        if normalise not in ("population", "candidates"):
            raise ValueError(f"normalise {normalise!r}: expected population or candidates")
        if not candidates:
            raise ValueError("candidates: expected at least one guidance scale")
        if not (evaluator and kinds) and not pixel_scorers:
            raise ValueError("dynamic guidance needs an evaluator, or pixel_scorers")
        self.candidates = torch.tensor([float(value) for value in candidates])
        self.kinds = tuple(kinds) if evaluator else ()
        self.weighting, self.normalise, self.fallback = weighting, normalise, fallback
        self._names = (evaluator, tuple(pixel_scorers))
        self._evaluator: LatentJudge | None = None
        self._scorers: list[RewardScorer] | None = None
        self._prompt: tuple[Tensor, ...] | None = None
        self._history: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._searched: list[int] = []

    @property
    def judges(self) -> list[str]:
        """Names in the order of the scores: evaluator kinds, then pixel scorers."""
        return [*self.kinds, *self._names[1]]

    def use(self, evaluator: LatentJudge | None = None, scorers: Sequence[RewardScorer] | None = None) -> None:
        """Take these instead of loading what the settings name."""
        self._evaluator = evaluator or self._evaluator
        self._scorers = self._scorers if scorers is None else list(scorers)

    def reset(self) -> None:
        super().reset()
        self._history, self._scores, self._weights, self._searched = [], [], [], []
        self._prompt = None

    def bind(self, view: StepView) -> None:
        super().bind(view)
        if self._evaluator is None and self._names[0] and self.kinds:
            self._evaluator = load_judge(self._names[0])
        if self._scorers is None:
            self._scorers = [load_scorer(name) for name in self._names[1]]
        if self._evaluator is not None and self._prompt is None:
            self._evaluator.to(view.x_t.device)
            check_kinds(self._evaluator, self.kinds)
            self._evaluator.check(view.x_t, view.cond)
            if view.space is not None:
                check_latents(self._evaluator, view.space)
            if self.normalise == "population" and not self._evaluator.calibrated:
                raise ValueError(f"evaluator {self._names[0]} has no statistics: set normalise to candidates")
            with torch.no_grad():
                self._prompt = self._evaluator.read(view.cond, view.prompts)

    def searching(self) -> bool:
        """Whether the bound step is in [start, stop)."""
        view = self.view
        return view is None or self._start * view.num_steps <= view.step < self._stop * view.num_steps

    def wants_null(self) -> bool:
        return bool((self.candidates != 1).any()) if self.searching() else self.fallback > 1

    @torch.no_grad()
    def scale(self, pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
        view = self.view
        assert view is not None
        batch = len(pred_cond)
        if not self.searching():
            return torch.full((batch,), self.fallback)
        scores = self.score_candidates(view, pred_cond, pred_uncond)  # (E, B, K)
        weights = WEIGHTINGS[self.weighting](self._history, view.step / view.num_steps, len(scores), batch)
        weights = send(weights, scores.device).to(scores.dtype)
        best = (weights[:, :, None] * scores).sum(dim=0).argmax(dim=1)
        self._history.append(scores.gather(2, best.expand(len(scores), batch)[:, :, None])[:, :, 0])
        self._scores.append(scores)
        self._weights.append(weights)
        self._searched.append(view.step)
        return send(self.candidates, scores.device)[best]

    def score_candidates(self, view: StepView, pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
        """Standardised scores (evaluators, B, K) of every candidate."""
        batch, count = len(pred_cond), len(self.candidates)
        scale = send(self.candidates, pred_cond.device).to(pred_cond.dtype).view(1, -1, 1, 1, 1)

        def candidates(function: Callable[[Tensor], Tensor]) -> Tensor:
            low, high = function(pred_uncond), function(pred_cond)
            return (low[:, None] + scale * (high - low)[:, None]).flatten(0, 1)  # (B K, C, h, w)

        found: list[Tensor] = []
        if self._evaluator is not None and self.kinds:
            after = view.after.preserving()
            level = torch.full((batch * count,), float(log_snr(torch.tensor(after.alpha_sq)))).to(pred_cond.dtype)
            level = send(level, pred_cond.device)
            assert self._prompt is not None
            prompt = tuple(part.repeat_interleave(count, dim=0) for part in self._prompt)
            latents = candidates(view.clean if self._evaluator.clean else view.judged)
            scores = self._evaluator.judge(latents, level, prompt, scale.flatten().repeat(batch))
            found += [scores[kind].view(batch, count) for kind in self.kinds]
        if self._scorers:
            images = (view.decode(candidates(view.clean)) / 2 + 0.5).clamp(0, 1)
            prompts = [prompt for prompt in view.prompts for _ in range(count)]
            for scorer in self._scorers:
                reward = send(scorer.score(images, prompts).reward, pred_cond.device).to(pred_cond.dtype)
                reward = reward.view(batch, count)
                reward = reward if scorer.higher_is_better else -reward
                mean, std = scorer.statistics or (0.0, 1.0)
                found.append((reward - mean) / std)
        together = torch.stack(found)
        if self.normalise == "candidates":
            centred = together - together.mean(dim=2, keepdim=True)
            together = centred / together.std(dim=2, keepdim=True, correction=0).clamp(min=1e-6)
        return together

    def records(self) -> list[dict[str, Any]]:
        """Per image: "scales" by step, "candidates", "searched" (the steps), "scores" and "weights" by evaluator."""
        rows = super().records()
        if not self._scores:
            return rows
        # (E, B, T, K) and (E, B, T): read here, once a run, so that no step waits for the device
        scores, weights = torch.stack(self._scores, dim=2).cpu(), torch.stack(self._weights, dim=2).cpu()
        for b, row in enumerate(rows):
            row["candidates"], row["searched"] = self.candidates.tolist(), list(self._searched)
            row["scores"] = {name: scores[i, b].tolist() for i, name in enumerate(self.judges)}
            row["weights"] = {name: weights[i, b].tolist() for i, name in enumerate(self.judges)}
        return rows
