"""Settings of training scorers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusion_align.training.engine.config import JudgeRun, NonNegativeFloat, PlanNotes, Positive, PositiveFloat
from diffusion_align.training.policy.data_config import JudgedPairs


@dataclass(frozen=True, kw_only=True)
class RewardConfig(JudgedPairs, JudgeRun):
    """Train a scorer on judged pairs (vp-score, edit, pal, clip) or on rated repaintings (prefpaint)."""

    method: ClassVar[str] = "reward"
    takes_model: ClassVar[bool] = False

    # -- optimisation
    per_device_train_batch_size: Positive = 64
    """Pairs (prefpaint: pictures) per device and micro-step."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate, for a small scorer from nothing; one that starts from large trained weights wants about
    1e-5."""

    # -- scorer
    scorer: str = "vp-score"
    """What to train: vp-score (score per aspect), edit (before and after), pal (per user), clip, prefpaint
    (repaintings); or a trained scorer to continue from: the name of a shipped one, or a folder."""
    architecture: str = "small"
    """small and objects are for 64-pixel scenes; objects finds objects and then reads them (pretrain its reader).
    image-reward: ViT-L/16 and BERT-base (vp-score); clip-b32: OpenAI's CLIP (prefpaint)."""
    tokenizer: str = "scenes-sdxl"
    """Shipped model, folder or hub name that has the tokenizer (vp-score, edit, clip)."""
    freeze_vision: bool = False
    """Train only the part that reads, not the part that sees pictures (vp-score): for a start, when only the part that
    sees is trained already."""
    reader: str | None = None
    """Trained vp-score whose picture and text reader an edit scorer starts from; unset: a fresh one."""
    clip: str = "scenes-clip"
    """Scorer whose frozen embeddings are used (pal)."""
    pal_variant: Literal["a", "b"] = "b"
    """a: ideal points; b: ideal points that depend on the prompt."""
    pal_prototypes: Positive = 4
    """Number of prototypes; every user is a mixture of them."""

    # -- data
    dataset: str = "scenes-pairs"
    """Judged pairs in Pick-a-Pic's columns, also label_0_ASPECT, user_id, source (before an edit), wrong_words_0 and
    wrong_words_1 (the words that each image does not show; a vp-score then learns to say so). For prefpaint: rated
    repaintings: image, source, mask, score_CRITERION."""
    validation_split: str | None = "validation"
    """Split of the same data set that accuracy is measured on; unset: none."""
    rows_together: Positive = 1
    """Number of rows that stand together in the data set and are drawn together, e.g. all pairs of one prompt's
    pictures: a picture in several pairs of a batch is encoded once."""

    # -- objective
    aspect_weight: NonNegativeFloat = 1.0
    """Weight of the aspects' mean loss beside the overall one."""
    word_weight: NonNegativeFloat = 1.0
    """Weight of the words' mean loss (vp-score, on data with wrong_words_0 and wrong_words_1)."""
    contrastive_weight: NonNegativeFloat = 0.0
    """Weight of BLIP's image-text contrastive loss on the preferred pictures (vp-score trained from nothing)."""

    def next_commands(self) -> list[list[str]]:
        return [["score", "FOLDER_OF_PICTURES", "--scorers", self.output_dir]]

    def plan(self, world_size: int = 1) -> PlanNotes:
        from .building import open_judgements

        judgements = open_judgements(self, self.dataset_split, self.max_pairs)
        return PlanNotes({"data": f"{len(judgements):,} {judgements.unit}"}, len(judgements))
