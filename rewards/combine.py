"""Scorers made of scorers."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .protocol import Images, RewardOutput, RewardScorer

How = Literal["mean", "median", "min", "mean-std", "quantile"]


class Combined(RewardScorer):
    """A scorer of ``members``: images are handed on as they came, each member preprocesses them itself."""

    def __init__(self, name: str, members: Sequence[RewardScorer]) -> None:
        super().__init__()
        if not members:
            raise ValueError(f"{name}: expected at least one member")
        self.name, self.members = name, nn.ModuleList(members)
        self.differentiable = all(member.differentiable for member in members)
        self.elsewhere = all(member.elsewhere for member in members)
        self.needs = frozenset[str]().union(*(member.needs for member in members))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for member in self.members:
            assert isinstance(member, RewardScorer)
            member.check_prompts(prompts)

    def _preprocessed(self, batch: Tensor | list[Tensor]) -> Any:
        return batch  # each member resizes as it must

    def outputs(self, images: Images, prompts: list[str], context: dict[str, Any]) -> list[RewardOutput]:
        """Every member's output, in order, turned so that higher is better, rewards on this scorer's device."""
        outputs = []
        for member in self.members:
            assert isinstance(member, RewardScorer)
            output = member.score(images, prompts, **context)
            if not member.higher_is_better:
                output = RewardOutput(-output.reward, output.aspects, output.std)
            # Members without weights score on the CPU, whatever device the others are on.
            outputs.append(replace(output, reward=output.reward.to(self.device)))
        return outputs


class Standardiser(nn.Module):
    """Running mean and standard deviation (Welford) of a scorer's rewards; saved with the scorer."""

    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, statistics: tuple[float, float] | None = None) -> None:
        super().__init__()
        mean, std = statistics or (0.0, 0.0)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("square", torch.tensor(std**2 if statistics else 0.0, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1.0 if statistics else 0.0, dtype=torch.float64))
        self.fixed = statistics is not None

    @torch.no_grad()
    def update(self, rewards: Tensor) -> None:
        """Take ``rewards`` (B,) into account; without effect when the statistics were given."""
        if self.fixed:
            return
        values = rewards.detach().double().cpu()
        count = self.count + len(values)
        delta = values.mean() - self.mean
        spread = values.var(unbiased=False) * len(values) + delta.square() * self.count * len(values) / count
        self.square.copy_((self.square * self.count + spread) / count)
        self.mean.add_(delta * len(values) / count)
        self.count.copy_(count)

    def forward(self, rewards: Tensor) -> Tensor:
        """(B,) rewards in units of their standard deviation."""
        std = float(self.square.sqrt())
        return (rewards - float(self.mean)) / (std if std > 1e-8 else 1.0)


class Ensemble(Combined):
    """Members after standardisation, merged; ``std`` (and the aspect "disagreement") is the members' spread.

    Ensembles weaken over-optimisation, they do not end it (2312.09244, 2310.02743): members share mistakes.

    Args:
        members: scorers of the same thing.
        how: "mean", "median", "min", "mean-std" (mean - ``weight`` * variance, the uncertainty-weighted objective of
            2310.02743) or "quantile" (the ``weight`` quantile).
        weight: of "mean-std", or which quantile in [0, 1].
        standardise: "running" statistics of all rewards seen, "prompt" (within each prompt of the batch) or "none".
    """

    def __init__(
        self,
        members: Sequence[RewardScorer],
        how: How = "mean",
        weight: float = 0.5,
        standardise: Literal["running", "prompt", "none"] = "running",
        name: str = "ensemble",
    ) -> None:
        super().__init__(name, members)
        if how not in ("mean", "median", "min", "mean-std", "quantile"):
            raise ValueError(f"how = {how!r}: expected mean, median, min, mean-std or quantile")
        if how == "quantile" and not 0 <= weight <= 1:
            raise ValueError(f"weight = {weight}: a quantile lies in [0, 1]")
        self.how, self.weight, self.standardise = how, weight, standardise
        self.standardisers = nn.ModuleList(Standardiser(member.statistics) for member in members)
        self.frozen_statistics = False

    def freeze_statistics(self, frozen: bool = True) -> Ensemble:
        """Stop updating the running statistics, so that a score no longer depends on what was scored before."""
        self.frozen_statistics = frozen
        return self

    def evaluate(self, images: Any, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        outputs = self.outputs(images, prompts, context)
        rows = []
        for standardiser, output in zip(self.standardisers, outputs, strict=True):
            assert isinstance(standardiser, Standardiser)
            if self.standardise == "prompt":
                rows.append(standardised_by_prompt(output.reward, prompts))
                continue
            if self.standardise == "running":
                if not self.frozen_statistics:
                    standardiser.update(output.reward)
                rows.append(standardiser(output.reward))
            else:
                rows.append(output.reward)
        rewards = torch.stack(rows)
        spread = rewards.std(dim=0, unbiased=False)
        merged = merge(rewards, self.how, self.weight)
        return RewardOutput(merged, {"disagreement": spread.detach()}, spread, members=rewards.T)


def merge(rewards: Tensor, how: How, weight: float) -> Tensor:
    """(M, B) rewards of M members to (B,)."""
    if how == "mean":
        return rewards.mean(dim=0)
    if how == "median":
        return rewards.quantile(0.5, dim=0)
    if how == "min":
        return rewards.amin(dim=0)
    if how == "quantile":
        return rewards.quantile(weight, dim=0)
    return rewards.mean(dim=0) - weight * rewards.var(dim=0, unbiased=False)


def standardised_by_prompt(rewards: Tensor, prompts: Sequence[str]) -> Tensor:
    """(B,) rewards, mean 0 and deviation 1 among the images of each prompt; 0 for a prompt's only image."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([order[prompt] for prompt in prompts], device=rewards.device)
    count = torch.zeros(len(order), device=rewards.device).index_add(0, group, torch.ones_like(rewards))
    mean = torch.zeros(len(order), device=rewards.device).index_add(0, group, rewards) / count
    centred = rewards - mean[group]
    variance = torch.zeros(len(order), device=rewards.device).index_add(0, group, centred.square()) / count
    return centred / variance.sqrt().clamp(min=1e-6)[group]


class Weighted(Combined):
    """A weighted sum; the members' rewards are its aspects.

    Args:
        members: scorer to weight, by the name of its aspect.
        standardise: bring each member to its published (or running) mean 0 and deviation 1 first.
    """

    def __init__(
        self, members: Mapping[str, tuple[RewardScorer, float]], standardise: bool = True, name: str = "weighted"
    ) -> None:
        super().__init__(name, [scorer for scorer, _ in members.values()])
        self.weights = {aspect: weight for aspect, (_, weight) in members.items()}
        self.standardise = standardise
        self.standardisers = nn.ModuleList(Standardiser(scorer.statistics) for scorer, _ in members.values())

    def evaluate(self, images: Any, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        outputs = self.outputs(images, prompts, context)
        total = torch.zeros(len(prompts), device=outputs[0].reward.device)
        for (_, weight), output, standardiser in zip(self.weights.items(), outputs, self.standardisers, strict=True):
            assert isinstance(standardiser, Standardiser)
            value = output.reward
            if self.standardise:
                standardiser.update(value)
                value = standardiser(value)
            total = total + weight * value
        return RewardOutput(total, dict(zip(self.weights, (o.reward.detach() for o in outputs), strict=True)))


class Calibrated(Combined):
    """A scorer whose reward differences mean log-odds: P(a over b) = sigmoid(reward_a - reward_b).

    ``fit`` finds the temperature by maximum likelihood on labelled pairs.
    """

    def __init__(self, member: RewardScorer, temperature: float = 1.0, bias: float = 0.0) -> None:
        super().__init__(f"{member.name} (calibrated)", [member])
        self.register_buffer("temperature", torch.tensor(temperature, dtype=torch.float64))
        self.bias = bias

    def fit(self, differences: Tensor, preferred: Tensor) -> Calibrated:
        """Set the temperature.

        Args:
            differences: (N,) raw rewards of image 0 minus image 1.
            preferred: (N,) P(image 0 is preferred) as labelled: 0, 0.5 or 1.
        """
        x, y = differences.double(), preferred.double()
        log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_scale], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(x * log_scale.exp(), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        self.temperature.copy_(torch.exp(-log_scale.detach()))  # type: ignore[operator]
        return self

    def evaluate(self, images: Any, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        output = self.outputs(images, prompts, context)[0]
        scale = 1 / float(self.temperature)  # type: ignore[arg-type]
        std = None if output.std is None else output.std * scale
        return RewardOutput((output.reward - self.bias) * scale, output.aspects, std)


class Cached(Combined):
    """Remembers scores by content (pixels, prompt and context), e.g. for a slow scorer over repeated pictures.

    No gradients. The ``capacity`` last pictures are kept.
    """

    def __init__(self, member: RewardScorer, capacity: int = 100_000) -> None:
        super().__init__(member.name, [member])
        self.differentiable = False
        self.capacity = capacity
        self.rows: OrderedDict[str, RewardOutput] = OrderedDict()

    def evaluate(self, images: Any, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        keys = [
            content_key(images[i], prompt, {name: value[i] for name, value in context.items()})
            for i, prompt in enumerate(prompts)
        ]
        known = {key: self.rows[key] for key in keys if key in self.rows}
        new = list({key: i for i, key in enumerate(keys) if key not in known}.values())
        if new:
            part: dict[str, list[Any]] = {name: [value[i] for i in new] for name, value in context.items()}
            stacked = {name: torch.stack(v) if isinstance(v[0], Tensor) else v for name, v in part.items()}
            wanted = images[new] if isinstance(images, Tensor) else [images[i] for i in new]
            output = self.outputs(wanted, [prompts[i] for i in new], stacked)[0]
            for row, i in enumerate(new):
                known[keys[i]] = RewardOutput(
                    output.reward[row : row + 1],
                    {name: value[row : row + 1] for name, value in output.aspects.items()},
                    None if output.std is None else output.std[row : row + 1],
                )
        for key in keys:
            self.rows[key] = known[key]
            self.rows.move_to_end(key)
        while len(self.rows) > self.capacity:
            self.rows.popitem(last=False)
        return RewardOutput.cat([known[key] for key in keys])


def content_key(image: Tensor, prompt: str, context: Mapping[str, Any]) -> str:
    """SHA-256 of a picture, its prompt and its context."""
    digest = hashlib.sha256()
    for name, value in [("image", image), ("prompt", prompt), *sorted(context.items())]:
        digest.update(f"|{name}|".encode())
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.numpy().tobytes())
        else:
            digest.update(str(value).encode())
    return digest.hexdigest()
