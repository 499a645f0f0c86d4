"""KTO and BCO: pictures that are liked or not, each by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data.types import PairBatch
from diffusion_align.objectives.list_stats import Targets
from diffusion_align.objectives.one_signature import UNPAIRED_LOSSES, check_name, unpaired_preference_loss
from diffusion_align.training.engine.metrics import Metrics
from diffusion_align.training.engine.randomness import LABEL, SECOND_SAMPLE, generators, mix
from diffusion_align.training.engine.sourced_method import BatchSource

from ..compared import ComparedMethod
from ..noising import Noising
from ..reference import Reference
from .by_caption import seeds_by_caption
from .config import KTOConfig
from .label_means import LabelMeans

#: The figures that are averaged by label.
REWARD, ERROR, ERROR_UP = range(3)


class LabelledMethod(ComparedMethod):
    """One forward pass of policy and reference for pictures with labels, each with noise of its own (the official code)
    or, with ``shared_noise``, with that of the other pictures of its caption.

    Pairs are two pictures. Arguments are those of ``PairMethod``.
    """

    config: KTOConfig

    def __init__(
        self,
        config: KTOConfig,
        adapter: Adapter,
        source: BatchSource[PairBatch],
        noising: Noising,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        reference: Reference | None = None,
    ) -> None:
        super().__init__(config, adapter, source, noising, autocast, reference, watch_frozen=config.watches_frozen)
        check_name(config.loss_type, UNPAIRED_LOSSES)
        self.seen = LabelMeans(3, config.shift_decay, adapter.device)

    def loss(self, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """Mean loss of the pictures (scalar) and its metrics (scalar tensors on the device).

        Metrics by label are running means (``shift_decay``) over all processes, because a batch may lack one of them:
        ``rewards/chosen``, ``rewards/rejected``, ``margin``, ``error_chosen``, ``error_rejected``, ``chosen_error_up``.
        """
        config = self.config
        batch = labelled(batch, config.positive_ratio, config.shared_noise)
        seeds, doubted = batch.seeds, bool((batch.preference != 1).any())
        batch = batch.to(self.adapter.device)
        label = batch.label
        assert label is not None
        found = self.measured(batch, seeds)
        stats = found.stats
        reward, error = 0.5 * config.beta * stats.s.detach().squeeze(1), stats.error.detach().squeeze(1)
        self.seen.update(torch.stack([reward, error, (reward < 0).float()]), label)
        balanced = UNPAIRED_LOSSES[config.loss_type].balanced
        result = unpaired_preference_loss(
            config.loss_type,
            stats,
            Targets(label=label, p=batch.preference if doubted else None),
            beta=config.beta,
            shift=self.seen.balanced(REWARD) if balanced else self.seen.overall(REWARD),
            sample_weight=found.weight,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        liked, disliked = self.seen.means
        metrics = {
            "rewards/chosen": liked[REWARD],
            "rewards/rejected": disliked[REWARD],
            "margin": liked[REWARD] - disliked[REWARD],
            "error_chosen": liked[ERROR],
            "error_rejected": disliked[ERROR],
            "chosen_error_up": liked[ERROR_UP],
        }
        if found.frozen is not None and found.frozen.moved is not None:
            metrics["frozen/moved"] = found.frozen.moved.mean()
        watching = self.watch.of_labelled(found.t, found.from_base, label, config.beta, found.values)
        return result.loss, {"loss": result.loss.detach(), **result.metrics, **metrics, **found.metrics, **watching}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self.seen.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seen.load_state_dict(state)


def labelled(batch: PairBatch, positive_ratio: float | None, shared_noise: bool = False) -> PairBatch:
    """A batch on the host as pictures with labels; of pairs both, or one each, as ``KTOConfig.positive_ratio`` says.

    Without ``shared_noise`` the rejected picture of a pair has a seed of its own, so that it meets other noise at
    another level.

    Raises:
        ValueError: ``positive_ratio`` on pictures that are no pairs.
    """
    if batch.label is not None:
        if positive_ratio is not None:
            raise ValueError(f"{batch.keys[0]}: positive_ratio takes one image of each pair, and this is none")
        return replace(batch, seeds=seeds_by_caption(batch.captions, batch.seeds)) if shared_noise else batch
    others = batch.seeds
    if not shared_noise:
        others = torch.tensor([mix(seed, SECOND_SAMPLE) for seed in batch.seeds.tolist()], dtype=torch.int64)
    pictures = batch.as_pictures(torch.cat([batch.seeds, others]))
    if positive_ratio is None:
        return pictures
    drawn = [float(torch.rand(1, generator=each)) for each in generators(batch.seeds, LABEL)]
    return pictures.rows([i if share < positive_ratio else i + len(batch) for i, share in enumerate(drawn)])
