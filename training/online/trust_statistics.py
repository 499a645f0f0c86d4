"""Statistics of a scorer's features on the pairs (or ratings) it was trained on: what reward trust is computed from.

``python -m diffusion_align.training.online.trust_statistics SCORER DATASET`` writes them beside a trained scorer,
where runs find them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from diffusion_align.data import Comparisons, Ratings
from diffusion_align.data.comparisons import ComparisonExamples, collate_comparisons
from diffusion_align.evaluation.judging import score_both
from diffusion_align.evaluation.rated import rating_features
from diffusion_align.objectives.trust import FeatureStatistics, TrustWeight
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.rewards.published.prefpaint import PrefPaintScorer
from diffusion_align.shipped import SHIPPED_SCORERS, asset_folder, shipped_path

from .config import GRPOConfig

FILE = "trust.safetensors"


@torch.no_grad()
def comparison_features(scorer: RewardScorer, comparisons: Comparisons, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Features (N, 2, F) of both pictures of N pairs, and |P(first preferred) - label| (N,).

    Raises:
        ValueError: the scorer shows no features.
    """
    examples = ComparisonExamples(comparisons, scorer.preprocess)
    features, errors = [], []
    for start in range(0, len(examples), batch_size):
        rows = range(start, min(start + batch_size, len(examples)))
        batch = collate_comparisons([examples.example(i, 0, False) for i in rows], [0] * len(rows)).to(scorer.device)
        output = score_both(scorer, batch)
        if output.features is None:
            raise ValueError(f"trust needs reward features, which scorer {scorer.name} does not show")
        first, second = output.reward.float().chunk(2)
        features.append(torch.stack(output.features.float().chunk(2), dim=1).cpu())
        errors.append(((first - second).sigmoid() - batch.labels[:, 0]).abs().cpu())
    return torch.cat(features), torch.cat(errors)


def measure(scorer: RewardScorer, dataset: str, limit: int = 3000) -> FeatureStatistics:
    """Statistics on at most ``limit`` pairs of the train split, errors on those of the validation split.

    For PrefPaint's scorers ``dataset`` has rated repaintings instead of pairs.
    """
    if isinstance(scorer, PrefPaintScorer):
        seen, _ = rating_features(scorer, Ratings(dataset, "train", limit))
        held_out, errors = rating_features(scorer, Ratings(dataset, "validation", limit))
        return FeatureStatistics.measure(seen, held_out[:, None], errors)
    seen, _ = comparison_features(scorer, Comparisons(dataset, "train", limit))
    held_out, errors = comparison_features(scorer, Comparisons(dataset, "validation", limit))
    return FeatureStatistics.measure(seen.flatten(0, 1), held_out, errors)


def fit_trust(config: GRPOConfig, scorer: RewardScorer) -> TrustWeight:
    """The trust weight of ``config``: from ``trust_dataset``, or from the file beside the scorer.

    Raises:
        ValueError: there is neither of the two.
    """
    if config.trust_dataset is not None:
        return TrustWeight(config.trust, measure(scorer, config.trust_dataset))
    name = config.scorers[0]
    path = (shipped_path(name) if name in SHIPPED_SCORERS else Path(name)) / FILE
    if not path.is_file():
        raise ValueError(
            f"trust {config.trust}: scorer {config.scorers[0]} has no {FILE}: give trust_dataset, the judged pairs it "
            "was trained on, or set trust to none"
        )
    return TrustWeight(config.trust, FeatureStatistics.load(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scorer", help="shipped name, or folder of a trained scorer")
    parser.add_argument("dataset", help="the judged pairs (or ratings) it was trained on")
    args = parser.parse_args()
    statistics = measure(load_scorer(args.scorer), args.dataset)
    path = (asset_folder(args.scorer) if args.scorer in SHIPPED_SCORERS else Path(args.scorer)) / FILE
    statistics.save(path)
    print(f"{path}: {statistics.count} pictures, error line {statistics.error_line.tolist()}")


if __name__ == "__main__":
    main()
