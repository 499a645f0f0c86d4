"""One file per model family, which owns what differs between models."""

from .family import Family, NetworkInputs, encode_prompts
from .registry import FAMILIES, find_family, matching_family, pipeline_classes
from .understood import check_scheduler, check_understood

__all__ = [
    "FAMILIES",
    "Family",
    "NetworkInputs",
    "check_scheduler",
    "check_understood",
    "encode_prompts",
    "find_family",
    "matching_family",
    "pipeline_classes",
]
