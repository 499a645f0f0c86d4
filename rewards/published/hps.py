"""HPSv2 and HPSv2.1: CLIP with other weights."""

from __future__ import annotations

from diffusion_align.rewards.preprocess import Preprocess
from diffusion_align.rewards.protocol import RewardScorer
from diffusion_align.rewards.weights import find_file, load_exactly, read_weights

from .clip import OpenClipScorer, build_open_clip


def load_hps(
    name: str = "hps-v2.1",
    checkpoint: str | None = None,
    model: str = "ViT-H-14",
    antialias: bool = True,
) -> RewardScorer:
    """Human Preference Score v2 or v2.1 (2306.09341): a tuned CLIP-H, cosine without the logit scale.

    The two versions' scores are not comparable. Pictures are padded to a square, not cropped.

    Args:
        antialias: False makes pictures smaller as the official code did with torchvision before 0.17, whose resizing of
            tensors used no filter: for scores beside those of papers from then.
    """
    filename = {"hps-v2": "HPS_v2_compressed.pt", "hps-v2.1": "HPS_v2.1_compressed.pt"}[name]
    path = find_file(checkpoint, "xswu/HPSv2", filename)
    clip, tokenizer, published = build_open_clip(model)
    load_exactly(clip, read_weights(path), path)
    return OpenClipScorer(name, clip, tokenizer, Preprocess(published.size, "pad", antialias=antialias))
