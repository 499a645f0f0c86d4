"""One file per model family, which owns what differs between models."""

from .family import Family, Guidance, NetworkInputs, checked_length, encode_prompts
from .registry import DENOISERS, FAMILIES, find_family, matching_family, pipeline_classes
from .understood import check_scheduler, check_understood

__all__ = [
    "DENOISERS",
    "FAMILIES",
    "Family",
    "Guidance",
    "NetworkInputs",
    "check_scheduler",
    "check_understood",
    "checked_length",
    "encode_prompts",
    "find_family",
    "matching_family",
    "pipeline_classes",
]
