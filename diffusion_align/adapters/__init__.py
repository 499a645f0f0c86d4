"""What a model is: latents, prompts, noise, prediction and the policy/reference pair, for every supported family."""

from diffusion_align.process import Prediction
from diffusion_align.shipped import SHIPPED_MODELS, shipped_path

from .adapter import Adapter
from .conditioning import Conditioning
from .loading import load_adapter
from .parts import ENCODERS, PARTS, Part
from .prompts import PromptEncoder, encode_in_chunks

__all__ = [
    "ENCODERS",
    "PARTS",
    "SHIPPED_MODELS",
    "Adapter",
    "Conditioning",
    "Part",
    "Prediction",
    "PromptEncoder",
    "encode_in_chunks",
    "load_adapter",
    "shipped_path",
]
