"""One file per model family, which owns what differs between models."""

from .family import Family
from .registry import FAMILIES, find_family

__all__ = ["FAMILIES", "Family", "find_family"]
