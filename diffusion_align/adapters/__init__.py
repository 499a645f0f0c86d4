"""What a model is: latents, prompts, noise, prediction and the policy/reference pair, for every supported family."""

from diffusion_align.shipped import SHIPPED_MODELS, shipped_path

from .base import DEFAULT_LORA_TARGETS, Adapter
from .loading import load_adapter
from .prompts import PromptEncoder, encode_in_chunks
from .schedule import NoiseSchedule
from .types import Conditioning, Prediction

__all__ = [
    "DEFAULT_LORA_TARGETS",
    "SHIPPED_MODELS",
    "Adapter",
    "Conditioning",
    "NoiseSchedule",
    "Prediction",
    "PromptEncoder",
    "encode_in_chunks",
    "load_adapter",
    "shipped_path",
]
