"""Fresh scorers to train, and trained ones to continue."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from transformers import AutoTokenizer

from diffusion_align.data import Comparisons, Ratings
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.rewards.published.clip import OpenClipScorer, load_clip, save_open_clip
from diffusion_align.rewards.trained.architectures import READERS, reader_settings
from diffusion_align.rewards.trained.edit import EditScore
from diffusion_align.rewards.trained.pal import PALScorer
from diffusion_align.rewards.trained.repainting import RepaintingScorer
from diffusion_align.rewards.trained.scorer import CONFIG, read_config, scorer_folder
from diffusion_align.rewards.trained.vp import VPScore
from diffusion_align.shipped import SHIPPED_MODELS, SHIPPED_SCORERS, shipped_path
from diffusion_align.training.policy.data_config import selection_seed

if TYPE_CHECKING:
    from .config import RewardConfig

#: PrefPaint's design by ``RewardConfig.architecture``; the published one starts from OpenAI's CLIP.
REPAINTING: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "small": {
            "tower": "small",
            "vision": READERS["small"]["vision"],
            "image_size": 64,
            "heads": 8,
            "feedforward": 512,
        },
        "clip-b32": {
            "tower": "clip",
            "model": "ViT-B-32-quickgelu",
            "pretrained": "openai",
            "heads": 16,
            "feedforward": 1024,
        },
    }
)


def scorer_kind(name: str) -> str:
    """What kind of scorer ``RewardConfig.scorer`` is: its name, or what scorer.json of the trained one says.

    Raises:
        ValueError: no such scorer, or scorer.json is broken.
    """
    if name in BUILDERS:
        return name
    if name not in SHIPPED_SCORERS and not Path(name).is_dir():
        known = ", ".join((*BUILDERS, *SHIPPED_SCORERS))
        raise ValueError(f"scorer = {name!r}: expected one of {known}, or the folder of a trained scorer")
    folder = shipped_path(name) if name in SHIPPED_SCORERS else scorer_folder(name)
    return str(read_config(folder)["kind"]) if (folder / CONFIG).is_file() else "clip"


def open_judgements(config: RewardConfig, split: str, limit: int | None = None) -> Comparisons | Ratings:
    """The data that ``config.scorer`` learns from: rated repaintings for prefpaint, judged pairs for all others.

    Args:
        limit: how many rows, chosen as ``config.pair_selection`` says; None takes all.

    Raises:
        FileNotFoundError, OSError, ValueError: there is no such scorer or data, or a column is missing.
    """
    opener = Ratings if scorer_kind(config.scorer) == "prefpaint" else Comparisons
    seed = selection_seed(config.pair_selection, config.seed)
    return opener(config.dataset, split, limit, seed=seed, together=config.rows_together)


def build_scorer(config: RewardConfig, judgements: Comparisons | Ratings) -> RewardScorer:
    """The scorer of ``config.scorer``, fresh or continued, its weights ready for gradients.

    Raises:
        ValueError: no such scorer or architecture, or data that does not fit it (no users for PAL, no source images
            for edits, other criteria than a trained prefpaint's), or freeze_vision of another scorer than a vp-score.
    """
    torch.manual_seed(config.seed)
    kind = scorer_kind(config.scorer)
    scorer = BUILDERS[kind](config, judgements) if config.scorer == kind else load_scorer(config.scorer)
    if isinstance(scorer, RepaintingScorer) and isinstance(judgements, Ratings):
        check_criteria(scorer, judgements)
    trained = getattr(scorer, "trained_module", lambda: scorer)()
    trained.requires_grad_(True)
    if isinstance(scorer, VPScore) and not config.contrastive_weight:
        # Processes that train together wait for the gradient of every weight.
        scorer.contrastive_branch().requires_grad_(False)
    if config.freeze_vision:
        if not isinstance(scorer, VPScore):
            raise ValueError(f"freeze_vision: expected a vp-score to train, found {kind}")
        scorer.reader.freeze_vision()
    return scorer


def find_tokenizer(name: str) -> Any:
    """The tokenizer of a shipped model, a folder or the hub."""
    return AutoTokenizer.from_pretrained(str(shipped_path(name) / "tokenizer") if name in SHIPPED_MODELS else name)


def new_vp(config: RewardConfig, comparisons: Comparisons) -> RewardScorer:
    tokenizer = find_tokenizer(config.tokenizer)
    settings = reader_settings(config.architecture, tokenizer)
    return VPScore({**settings, "aspects": comparisons.aspects, "words": comparisons.marked}, tokenizer)


def new_edit(config: RewardConfig, comparisons: Comparisons) -> RewardScorer:
    if "source" not in comparisons.source.columns:
        raise ValueError(f"{comparisons.source.name}: column 'source' is missing: edits are judged beside the original")
    if config.reader is None:
        tokenizer = find_tokenizer(config.tokenizer)
        return EditScore(reader_settings(config.architecture, tokenizer), tokenizer)
    teacher = load_scorer(config.reader)
    if not isinstance(teacher, VPScore):
        raise ValueError(f"reader = {config.reader!r}: expected a trained vp-score, found {teacher.name}")
    settings = {key: value for key, value in teacher.settings().items() if key not in ("aspects", "words")}
    scorer = EditScore(settings, teacher.tokenizer)
    learned = {key: value for key, value in teacher.reader.state_dict().items() if key != "roles"}
    scorer.reader.load_state_dict(learned, strict=False)  # "roles" is per picture: one there, two here
    return scorer


def new_pal(config: RewardConfig, comparisons: Comparisons) -> RewardScorer:
    users = comparisons.users()
    if not users:
        raise ValueError(f"{comparisons.source.name}: column 'user_id' is missing: PAL learns who likes what")
    return PALScorer(load_scorer(config.clip), config.clip, users, config.pal_variant, config.pal_prototypes)


def new_clip(config: RewardConfig, comparisons: Comparisons) -> RewardScorer:
    """A small CLIP of open_clip with a ResNet, in open_clip's own folder layout."""
    tokenizer = find_tokenizer(config.tokenizer)
    model = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 16, "head_width": 16},
        "text_cfg": {
            "context_length": 24,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "own",
            "width": 128,
            "heads": 4,
            "layers": 3,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    }
    half = [0.5, 0.5, 0.5]
    layout = {"model_cfg": model, "preprocess_cfg": {"mean": half, "std": half}}
    with tempfile.TemporaryDirectory() as folder:
        save_open_clip(Path(folder), open_clip.CLIP(**model), layout, tokenizer)
        scorer = load_clip("clip", model=f"local-dir:{folder}")
    assert isinstance(scorer, OpenClipScorer)
    return scorer


def new_prefpaint(config: RewardConfig, ratings: Ratings) -> RewardScorer:
    if config.architecture not in REPAINTING:
        raise ValueError(f"architecture = {config.architecture!r}: expected one of {', '.join(REPAINTING)} (prefpaint)")
    settings = json.loads(json.dumps(REPAINTING[config.architecture]))
    return RepaintingScorer({**settings, "criteria": ratings.statistics()}, pretrained=True)


def check_criteria(scorer: RepaintingScorer, ratings: Ratings) -> None:
    """Whether ``ratings`` have the criteria of ``scorer``, in any order.

    Raises:
        ValueError: they have not.
    """
    if sorted(scorer.criteria) != sorted(ratings.criteria):
        raise ValueError(
            f"{ratings.source.name}: has the criteria {', '.join(ratings.criteria)}; "
            f"the scorer was trained for {', '.join(scorer.criteria)}"
        )


BUILDERS: Mapping[str, Callable[[RewardConfig, Any], RewardScorer]] = MappingProxyType(
    {"vp-score": new_vp, "edit": new_edit, "pal": new_pal, "clip": new_clip, "prefpaint": new_prefpaint}
)
