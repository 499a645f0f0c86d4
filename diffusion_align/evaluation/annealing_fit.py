"""Learning a guidance schedule s(t, |delta|) from rollouts: which scale, at which state, led to better pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.devices import fast_autocast
from diffusion_align.guidance.annealing import AnnealingSchedule, disagreement, level_of, share_of_range
from diffusion_align.guidance.schedules import TableGuidance
from diffusion_align.rewards import RewardScorer, score_in_batches
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample

#: Of the random schedules: spread of their slope over the run and of each step, as shares of the range of log s.
SLOPE, JITTER = 0.35, 0.15
#: Width of the network, steps and rate of its fit.
HIDDEN, FIT_STEPS, RATE = 8, 400, 0.03
#: Weight of the penalty on the value's coefficients, relative to the features' own spread.
RIDGE = 0.02
FOLDS = 5


@dataclass(frozen=True)
class Rollouts:
    """What random schedules gave.

    Attributes:
        levels: (N, steps) log-SNR.
        deltas: (N, steps), |eps_prompt - eps_null| as root mean square.
        scales: (N, steps), as they were drawn.
        reward: (N,), higher is better.
        group: (N,) int64, which prompt.
    """

    levels: Tensor
    deltas: Tensor
    scales: Tensor
    reward: Tensor
    group: Tensor


@dataclass(frozen=True)
class FittedSchedule:
    """A schedule, and how well its value was known.

    Attributes:
        explained: share of the reward's variance within prompts that the value predicts for prompts that it was not
            fitted on; at 0 or less the rollouts do not tell one scale from another.
        rollouts: how many pictures it was fitted on.
    """

    schedule: AnnealingSchedule
    explained: float
    rollouts: int


class RecordingTable(TableGuidance):
    """A table of scales that notes each step's state."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__(table, branches=[2] * len(table))
        self.states: list[tuple[Tensor, Tensor]] = []

    def scale(self, pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
        view = self.view
        assert view is not None
        delta = disagreement(view, pred_cond, pred_uncond)
        self.states.append((torch.full_like(delta, level_of(view)), delta))
        return super().scale(pred_cond, pred_uncond)


def random_schedules(count: int, steps: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(count, steps) scales in [low, high]: log s is a random level, plus a random slope, plus noise at each step."""
    span = math.log(high / low)
    level = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    slope = SLOPE * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    jitter = JITTER * torch.randn(count, steps, generator=generator, dtype=torch.float64)
    progress = torch.linspace(-1, 1, steps, dtype=torch.float64)
    return (low * torch.exp(span * (level + slope * progress + jitter))).clamp(low, high)


def roll_out(
    adapter: Adapter,
    scorer: RewardScorer,
    prompts: Sequence[str],
    *,
    low: float,
    high: float,
    per_prompt: int = 8,
    steps: int = 20,
    seed: int = 0,
    batch_size: int = 32,
    bf16: bool = True,
) -> Rollouts:
    """Draw every prompt ``per_prompt`` times with random schedules from ``low`` to ``high``, and judge the pictures.

    Picture k of prompt i has seed ``seed`` + k * len(prompts) + i.

    Raises:
        ValueError: fewer than 2 pictures of a prompt, or a range that is none.
    """
    if per_prompt < 2:
        raise ValueError(f"per_prompt = {per_prompt}: expected at least 2, schedules are compared within a prompt")
    if not 0 < low < high:
        raise ValueError(f"scales between {low:g} and {high:g}: expected 0 < low < high")
    generator = torch.Generator().manual_seed(seed)
    parts: list[Rollouts] = []
    for k in range(per_prompt):
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            scales = random_schedules(len(texts), steps, low, high, generator)
            guider = RecordingTable(scales.T.tolist())
            with fast_autocast(adapter.device, bf16):
                drawn = sample(
                    adapter, texts, num_inference_steps=steps, guidance=guider,
                    seeds=[seed + k * len(prompts) + start + i for i in range(len(texts))],
                    options=SamplingOptions(batch_size=batch_size),
                )  # fmt: skip
            reward = score_in_batches(scorer, drawn.images, texts).reward.cpu().double()
            levels, deltas = (torch.stack(part, dim=1).cpu().double() for part in zip(*guider.states, strict=True))
            group = torch.arange(start, start + len(texts))
            parts.append(Rollouts(levels, deltas, scales, reward if scorer.higher_is_better else -reward, group))
    return Rollouts(*(torch.cat([getattr(part, name) for part in parts]) for name in Rollouts.__dataclass_fields__))


def fit_annealing(found: Rollouts, low: float, high: float, seed: int = 0) -> FittedSchedule:
    """Regress the reward on states and scales, then fit the schedule that the value likes best.

    The value of a run is the mean over its steps of q(z, l) = (g1 . basis(z)) l + (g2 . basis(z)) l^2, with
    z = standardised (log-SNR, log |delta|), basis (1, z1, z1^2, z2, z1 z2) and l = log s, centred. It is fitted to
    what remains of the reward after each prompt's mean (ridge regression). A small network then maximises q over the
    states that the rollouts visited. All in float64; equal rollouts give equal schedules.
    """
    states = torch.stack([found.levels, found.deltas.clamp(min=1e-12).log()], dim=2)  # (N, steps, 2)
    mean, std = states.flatten(0, 1).mean(dim=0), states.flatten(0, 1).std(dim=0).clamp(min=1e-6)
    z = (states - mean) / std
    features = value_features(z, centred(found.scales, low, high)).mean(dim=1)
    x, y = within(features, found.group), within(found.reward[:, None], found.group)[:, 0]
    weights = ridge(x, y)
    fold = found.group % FOLDS
    left = torch.cat([y[fold == k] - x[fold == k] @ ridge(x[fold != k], y[fold != k]) for k in fold.unique()])
    explained = 1 - float(left.square().sum() / y.square().sum().clamp(min=1e-30))
    schedule = maximised(z.flatten(0, 1), weights, mean, std, low, high, seed)
    return FittedSchedule(schedule, explained, len(found.reward))


def centred(scales: Tensor, low: float, high: float) -> Tensor:
    """log s, -1 at ``low`` and 1 at ``high``."""
    return 2 * (scales / low).log() / math.log(high / low) - 1


def value_features(z: Tensor, scale: Tensor) -> Tensor:
    """(..., 10): basis(z) l and basis(z) l^2 of states z (..., 2) and centred log scales l (...)."""
    first, second = z.unbind(dim=-1)
    basis = torch.stack([torch.ones_like(first), first, first.square(), second, first * second], dim=-1)
    return torch.cat([basis * scale[..., None], basis * scale.square()[..., None]], dim=-1)


def within(values: Tensor, group: Tensor) -> Tensor:
    """Values (N, F) less the mean of their group."""
    count = int(group.max()) + 1
    sums = values.new_zeros(count, values.shape[1]).index_add_(0, group, values)
    return values - (sums / torch.bincount(group, minlength=count).clamp(min=1)[:, None])[group]


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Coefficients (F,) of y (N,) on x (N, F), shrunk in units of each column's own spread."""
    gram = x.T @ x
    penalty = RIDGE * gram.diagonal().clamp(min=1e-12)
    return torch.linalg.solve(gram + torch.diag(penalty), x.T @ y)


def maximised(
    z: Tensor, weights: Tensor, mean: Tensor, std: Tensor, low: float, high: float, seed: int
) -> AnnealingSchedule:
    """The network whose scales have the highest value on average over states z (M, 2)."""
    generator = torch.Generator().manual_seed(seed)
    w1 = torch.randn(HIDDEN, 2, generator=generator, dtype=torch.float64)
    parameters = [w1, torch.zeros(HIDDEN), torch.zeros(HIDDEN), torch.zeros(())]
    parameters = [each.double().requires_grad_() for each in parameters]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    for _ in range(FIT_STEPS):
        share = share_of_range(z, *parameters)
        value = (value_features(z, 2 * share - 1) @ weights).mean()
        optimizer.zero_grad()
        (-value / weights.abs().max().clamp(min=1e-12)).backward()
        optimizer.step()
    return AnnealingSchedule(low, high, mean, std, *(each.detach() for each in parameters))
