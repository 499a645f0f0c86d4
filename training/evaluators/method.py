"""Training latent evaluators: losses, statistics and validation on noised pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from diffusion_align.adapters import Adapter
from diffusion_align.data import ComparisonBatch
from diffusion_align.guidance.judges.evaluator import BINS, HIGH, LOW, LatentEvaluator
from diffusion_align.objectives.ranking import bradley_terry_loss, thurstone_logit, thurstone_loss
from diffusion_align.process.levels import from_log_snr

from .config import EvaluatorConfig
from .noisy_pairs import EncodedPairs, NoisyBatch, known_scales, log_snrs, noised, seeded_batches

#: Bins of timesteps that calibration is reported in.
CALIBRATION_BINS = 5


class TrainableEvaluator:
    """An evaluator as the loop wants it; its scores are standardised when it is saved."""

    def __init__(self, evaluator: LatentEvaluator, calibrate: Callable[[LatentEvaluator], None]) -> None:
        self.evaluator, self.calibrate = evaluator, calibrate
        self.module: nn.Module = evaluator

    @property
    def network(self) -> nn.Module:
        return self.evaluator

    @property
    def shardable(self) -> tuple[nn.Module, ...]:
        return ()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.evaluator.named_parameters() if p.requires_grad}

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
        self.module = wrapper(self.module)
        return self.module

    def save(self, folder: Path) -> Path:
        self.calibrate(self.evaluator)
        return self.evaluator.save_pretrained(folder / "evaluator")


class EvaluatorMethod:
    """One loss per kind, summed; all on one pass of the tower over the noised pictures."""

    def __init__(
        self,
        config: EvaluatorConfig,
        adapter: Adapter,
        trained: TrainableEvaluator,
        generated: Any,
        real: Any | None,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.adapter, self.trained = config, adapter, trained
        self.loaders = {"generated": generated} | ({} if real is None else {"real": real})
        self.device, self.autocast = accelerator.device, accelerator.autocast

    def batches(self) -> Iterator[dict[str, NoisyBatch]]:
        iterators = {name: iter(loader) for name, loader in self.loaders.items()}
        while True:
            yield {name: next(iterator) for name, iterator in iterators.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: loader.state_dict() for name, loader in self.loaders.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, loader in self.loaders.items():
            loader.load_state_dict(state[name])

    def loss(self, batches: dict[str, NoisyBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the kinds' mean losses (scalar) and their metrics."""
        moved = {name: batch.to(self.device) for name, batch in batches.items()}
        prompts = [prompt for batch in moved.values() for prompt in batch.pairs.prompts]
        x_t = torch.cat([noised(self.adapter, batch) for batch in moved.values()], dim=1).flatten(0, 1)
        t = torch.cat([batch.t for batch in moved.values()]).repeat(2)
        level = log_snrs(self.adapter, t)
        with self.autocast():
            pictures, texts = self.trained.module(x_t, level, self.adapter.encode_prompts(prompts))
        pictures, texts = pictures.float().unflatten(0, (2, -1)), texts.float()
        splits = [len(batch.t) for batch in moved.values()]
        parts = {
            name: (picture, text)
            for name, picture, text in zip(moved, pictures.split(splits, dim=1), texts.split(splits), strict=True)
        }
        metrics: dict[str, Tensor] = {}
        for kind in self.config.kinds:
            metrics[f"loss/{kind}"] = getattr(self, kind)(moved, parts)
        loss = torch.stack(list(metrics.values())).sum()
        learned = self.trained.evaluator.log_variance
        if learned is not None:
            metrics |= zip(("variance/scale", "variance/floor"), learned.exp(), strict=True)
        return loss, {"loss": loss.detach()} | {name: value.detach() for name, value in metrics.items()}

    def alignment(self, batches: dict[str, NoisyBatch], parts: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """CLIP's symmetric loss on pictures that fit their prompts, with the pairs' other pictures as hard negatives;
        and Bradley-Terry on the pairs of generated pictures."""
        evaluator = self.trained.evaluator
        best = "real" if "real" in batches else "generated"
        pictures, texts = parts[best]
        label = self.fits(batches[best].pairs)
        rows = torch.arange(len(label), device=label.device)
        fitting, other = pictures[(label < 0.5).long(), rows], pictures[(label >= 0.5).long(), rows]
        scale = evaluator.logit_scale.exp().clamp(max=100)
        images = normalize(torch.cat([fitting, other]), dim=-1)
        logits = scale * normalize(texts[:, : images.shape[1]], dim=-1) @ images.T  # (B, 2B)
        by_text = cross_entropy(logits, rows)
        by_image = cross_entropy(logits[:, : len(rows)].T, rows)
        loss = (by_text + by_image) / 2
        if best == "real":
            pictures, texts = parts["generated"]
            first, second = self.pair_scores("alignment", batches["generated"], pictures, texts)
            loss = loss + bradley_terry_loss(first - second, self.fits(batches["generated"].pairs))
        return loss

    def truth(self, kind: str, pairs: ComparisonBatch) -> Tensor:
        """(B,) what ``kind`` should say of the pairs; 0.5 where it need not know."""
        if kind == "value":
            return self.of_known_scales(pairs).nan_to_num(0.5)
        return self.fits(pairs) if kind == "alignment" else pairs.labels[:, 0]

    def fits(self, pairs: ComparisonBatch) -> Tensor:
        """(B,) P(the first picture fits its prompt better)."""
        return self.verdicts(pairs, self.config.alignment_aspect)

    def of_known_scales(self, pairs: ComparisonBatch) -> Tensor:
        """(B,) P(people prefer what the first picture's scale made of the prompt); NaN where a scale is unknown."""
        known = pairs.scales.isfinite().all(dim=0)
        return torch.where(known, self.verdicts(pairs, self.config.value_aspect), torch.nan)

    def verdicts(self, pairs: ComparisonBatch, aspect: str) -> Tensor:
        """(B,) P(the first picture is better in ``aspect``), or as a whole where that was not judged."""
        names = self.aspects
        if aspect not in names:
            return pairs.labels[:, 0]
        label = pairs.labels[:, 1 + names.index(aspect)]
        return torch.where(label.isnan(), pairs.labels[:, 0], label)

    @property
    def aspects(self) -> list[str]:
        loader = self.loaders["generated"]
        names: list[str] = loader.examples.comparisons.aspects
        return names

    def fidelity(self, batches: dict[str, NoisyBatch], parts: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Binary cross-entropy, real (1) against generated (0), at every level."""
        real = batches["real"].pairs.labels[:, 0]
        pictures, texts = parts["real"]
        preferred = pictures[(real < 0.5).long(), torch.arange(len(real), device=real.device)]
        evaluator = self.trained.evaluator
        ones = evaluator.raw(preferred, texts, known_scales(batches["real"].pairs)[0])["fidelity"]
        zeros = self.pair_scores("fidelity", batches["generated"], *parts["generated"])
        return (
            binary_cross_entropy_with_logits(ones, torch.ones_like(ones))
            + binary_cross_entropy_with_logits(zeros, torch.zeros_like(zeros))
        ) / 2

    def preference(self, batches: dict[str, NoisyBatch], parts: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """On the judged pairs, Bradley-Terry, weighted by alpha_bar: near 0 where noise hides what was preferred; or
        Thurstone, whose variance grows with the noise instead."""
        batch, (pictures, texts) = batches["generated"], parts["generated"]
        first, second = self.pair_scores("preference", batch, pictures, texts)
        if self.trained.evaluator.settings.thurstone:
            return thurstone_loss(self.logit(first - second, batch.t), batch.pairs.labels[:, 0])
        weight = self.adapter.path.at(batch.t).preserving().alpha_sq.flatten()
        return bradley_terry_loss(first - second, batch.pairs.labels[:, 0], weight)

    def logit(self, difference: Tensor, t: Tensor) -> Tensor:
        """z of Phi(z), by the learned variance at timesteps t (B,)."""
        sigma = self.adapter.path.at(t).flow_sigma().flatten()
        return thurstone_logit(difference, self.trained.evaluator.variance(sigma))

    def probability(self, difference: Tensor, t: Tensor) -> Tensor:
        """P(the first picture is preferred) (B,) by differences of the preference scores at timesteps t."""
        if self.trained.evaluator.settings.thurstone:
            return torch.special.ndtr(self.logit(difference, t))
        return difference.sigmoid()

    def task(self, batches: dict[str, NoisyBatch], parts: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Squared error against the teacher's standardised reward."""
        batch, (pictures, texts) = batches["generated"], parts["generated"]
        assert batch.targets is not None
        predicted = self.pair_scores("task", batch, pictures, texts)
        return (predicted - batch.targets).square().mean()

    def value(self, batches: dict[str, NoisyBatch], parts: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Bradley-Terry on the judged pairs whose guidance scales are known, at every level: where noise hides the
        pictures, prompts and scales still tell what is preferred."""
        batch, (pictures, texts) = batches["generated"], parts["generated"]
        first, second = self.pair_scores("value", batch, pictures, texts)
        depends = self.trained.evaluator.scale_value
        assert depends is not None
        loss = bradley_terry_loss(first - second, self.of_known_scales(batch.pairs))
        return loss + self.config.scale_penalty * depends.weight.square().sum()

    def pair_scores(self, kind: str, batch: NoisyBatch, pictures: Tensor, texts: Tensor) -> Tensor:
        """(2, B) raw scores of both pictures."""
        sides = zip(pictures, known_scales(batch.pairs), strict=True)
        return torch.stack([self.trained.evaluator.raw(side, texts, scale)[kind] for side, scale in sides])


@torch.no_grad()
def calibrate(evaluator: LatentEvaluator, adapter: Adapter, examples: EncodedPairs) -> None:
    """Set the evaluator's mean and std per bin of log-SNR, over both pictures of the pairs at the bin's centre."""
    centres = LOW + (torch.arange(BINS) + 0.5) * (HIGH - LOW) / BINS
    levels = from_log_snr(centres)
    scores: list[list[Tensor]] = [[] for _ in range(BINS)]
    for batch in seeded_batches(examples, adapter.path):
        batch = batch.to(adapter.device)
        text = evaluator.text(adapter.encode_prompts(batch.pairs.prompts)).repeat(2, 1)
        clean, noise = batch.pairs.images.flatten(0, 1), batch.noise.repeat(2, 1, 1, 1)
        scales = known_scales(batch.pairs).flatten()
        for b in range(BINS):
            x_t = levels[b].noise(clean, noise)
            raw = evaluator.raw(evaluator.picture(x_t, centres[b].to(x_t).expand(len(x_t))), text, scales)
            scores[b].append(torch.stack([raw[kind] for kind in evaluator.settings.kinds]))
    for b, parts in enumerate(scores):
        together = torch.cat(parts, dim=1)
        evaluator.mean[:, b] = together.mean(dim=1)
        evaluator.std[:, b] = together.std(dim=1).clamp(min=1e-3)


@torch.no_grad()
def evaluate(
    evaluator: LatentEvaluator, method: EvaluatorMethod, examples: EncodedPairs, aspect: str
) -> dict[str, float]:
    """How often each kind tells the better one of a decisive pair, by thirds of the timesteps, and how far confidence
    exceeds that for the kind preference, by fifths."""
    adapter = method.adapter
    right: dict[str, list[Tensor]] = {}
    confidence: list[Tensor] = []
    times: list[Tensor] = []
    for batch in seeded_batches(examples, adapter.path):
        batch = batch.to(adapter.device)
        level = log_snrs(adapter, batch.t)
        texts = evaluator.text(adapter.encode_prompts(batch.pairs.prompts))
        sides = [
            evaluator.raw(evaluator.picture(side, level), texts, scales)
            for side, scales in zip(noised(adapter, batch), known_scales(batch.pairs), strict=True)
        ]
        times.append(adapter.path.timestep(batch.t))
        if "preference" in evaluator.settings.kinds:
            probability = method.probability(sides[0]["preference"] - sides[1]["preference"], batch.t)
            confidence.append(torch.maximum(probability, 1 - probability))
        for kind in evaluator.settings.kinds:
            if kind == "fidelity":
                continue  # both pictures are generated
            truth = method.truth(kind, batch.pairs)
            if kind == "task" and batch.targets is not None:
                truth = (batch.targets[0] > batch.targets[1]).float()
            hit = ((sides[0][kind] > sides[1][kind]) == (truth > 0.5)).float()
            right.setdefault(kind, []).append(torch.where(truth == 0.5, torch.nan, hit))
    where = torch.cat(times) * 3 // adapter.path.num_timesteps
    metrics = {}
    for kind, hits in right.items():
        together = torch.cat(hits)
        for third, name in enumerate(("clean", "middle", "noisy")):
            metrics[f"accuracy/{kind}/{name}"] = float(together[where == third].nanmean())
    if confidence:
        found = calibration(torch.cat(confidence), torch.cat(right["preference"]), torch.cat(times), adapter)
        metrics |= {f"calibration/preference/{name}": value for name, value in found.items()}
    return metrics


def calibration(confidence: Tensor, hits: Tensor, t: Tensor, adapter: Adapter) -> dict[str, float]:
    """Mean confidence less accuracy, by fifths of the timesteps: above 0 the evaluator is too sure.

    Args:
        confidence: (N,) max(P, 1 - P).
        hits: (N,) 1 where the better picture had the higher score, else 0; NaN where none is better.
        t: (N,) timesteps.

    Returns:
        By the fifth's timesteps, as "0-199"; NaN where no pair is judged.
    """
    steps, found = adapter.path.num_timesteps, {}
    for k in range(CALIBRATION_BINS):
        first, end = k * steps // CALIBRATION_BINS, (k + 1) * steps // CALIBRATION_BINS
        here = (t >= first) & (t < end) & ~hits.isnan()
        found[f"{first}-{end - 1}"] = float((confidence[here] - hits[here]).mean())
    return found
