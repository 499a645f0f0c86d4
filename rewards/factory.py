"""From a name to a scorer."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from .base import RewardScorer
from .oracle import ScenesOracle

SCORERS: Mapping[str, Callable[[], RewardScorer]] = MappingProxyType({ScenesOracle.name: ScenesOracle})


def load_scorer(name: str) -> RewardScorer:
    """Build the scorer ``name``.

    Raises:
        ValueError: no such scorer; the message lists the known ones.
    """
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown scorer {name!r}{hint}: known scorers are {', '.join(sorted(SCORERS))}")
    return SCORERS[name]()
