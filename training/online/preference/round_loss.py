"""The loss of own lists and human pairs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.devices import send
from diffusion_align.objectives.list_stats import ListStats, list_targets
from diffusion_align.objectives.one_signature import best_of, list_preference_loss, mean_where
from diffusion_align.objectives.pair_stats import LossOutput
from diffusion_align.objectives.preference import check_losses, preference_loss
from diffusion_align.objectives.safeguard import weighted_factor, with_rejected_gradient

from .config import OnlineDPOConfig
from .renoised_lists import Part


@dataclass(frozen=True)
class RoundLoss:
    """Mean loss of a micro-batch, whatever kind ``loss_type`` is.

    Raises:
        ValueError: losses that cannot be added up.
    """

    config: OnlineDPOConfig

    def __post_init__(self) -> None:
        if not self.config.is_list:
            check_losses(self.config.loss_types, self.config.loss_weights or None)

    def __call__(self, parts: Sequence[Part], stats: Sequence[ListStats]) -> LossOutput:
        """Of all parts together; the mean is over their lists."""
        return self.of_lists(parts, stats) if self.config.is_list else self.of_pairs(parts, stats)

    def of_pairs(self, parts: Sequence[Part], stats: Sequence[ListStats]) -> LossOutput:
        """One loss on all pairs, own and human."""
        config, device = self.config, stats[0].error.device
        pairs = joined(stats).as_pairs()
        weight = with_ones([part.weight for part in parts], parts)
        if config.safeguard_mu is not None:
            factor = weighted_factor(pairs, config.beta, config.safeguard_mu, config.safeguard)
            pairs = with_rejected_gradient(pairs, factor)
        p, target = with_ones([part.p for part in parts], parts), None
        per_gap = 0.5 if config.extragradient else config.score_target
        if per_gap is not None:  # then there are own pairs only
            gaps = [part.score[:, 0] - part.score[:, 1] for part in parts if part.score is not None]
            target = send(per_gap * torch.cat(gaps), device)
        result = preference_loss(
            config.loss_types,
            pairs,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            soft_labels=None if p is None else send(p, device),
            sample_weight=None if weight is None else send(weight, device),
            loss_weights=config.loss_weights or None,
            target=target,
        )
        if not config.sft_weight:
            return result
        return LossOutput(result.loss + config.sft_weight * pairs.chosen.mean(), result.per_sample, result.metrics)

    def of_lists(self, parts: Sequence[Part], stats: Sequence[ListStats]) -> LossOutput:
        """The same loss on each part's lists; metrics are those of own ones."""
        config, name = self.config, self.config.loss_types[0]
        total, (advantage, options) = sum(len(part) for part in parts), config.list_options()
        found, losses = [], []
        for part, of_part in zip(parts, stats, strict=True):
            score, device = part.score, of_part.error.device
            # Human pairs have no scores: the chosen one is a deviation above their mean, the other as much below.
            rank = None if score is not None else torch.tensor([0, 1], device=device).expand(len(part), 2)
            kind = "standardised" if score is None and advantage == "score" else advantage
            targets = list_targets(rank, None if score is None else send(score, device), of_part.present, kind)
            weight = None if part.weight is None else send(part.weight, device)
            result = list_preference_loss(name, of_part, targets, beta=config.beta, sample_weight=weight, **options)
            loss = result.loss
            if config.sft_weight:
                best = best_of(targets.ranks(), of_part.present)
                loss = loss + config.sft_weight * mean_where(of_part.error, best)
            found.append(result)
            losses.append(loss * (len(part) / total))
        return LossOutput(torch.stack(losses).sum(), found[0].per_sample, found[0].metrics)


def joined(stats: Sequence[ListStats]) -> ListStats:
    """Statistics of several batches of lists of one length as one."""
    if len(stats) == 1:
        return stats[0]

    def together(name: str) -> Tensor | None:
        values = [getattr(each, name) for each in stats]
        return None if values[0] is None else torch.cat(values)

    error = together("error")
    assert error is not None
    return ListStats(error, *(together(name) for name in ("reference", "mask", "moved", "overlap")))


def with_ones(values: Sequence[Tensor | None], parts: Sequence[Part]) -> Tensor | None:
    """Numbers of all parts (B,), ones where a part has none; None where no part has any."""
    if all(value is None for value in values):
        return None
    filled = [torch.ones(len(part)) if v is None else v.float().cpu() for v, part in zip(values, parts, strict=True)]
    return torch.cat(filled)
