"""Cards for which a plan estimates hours: what their makers publish, and what of it a step is assumed to use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

#: Of the published rate: an H200's large bf16 products reached 688 of 989 TFLOP/s, and its cached LoRA DPO steps of 8
#: pairs of SDXL 48% of that (docs/performance.md). No other card was measured.
UTILISATION = 688 / 989 * 0.48


@dataclass(frozen=True)
class Card:
    """One or several equal cards.

    Attributes:
        name: as it was given, without their number.
        half: TFLOP/s of one card for dense bf16 or fp16 products with float32 sums, as published.
        single: the same for float32 without TF32.
        memory: GiB that one has for a process; None where that is not known.
        utilisation: share of these rates that a step is assumed to use.
        count: how many cards.
    """

    name: str
    half: float
    single: float
    memory: float | None = None
    utilisation: float = UTILISATION
    count: int = 1

    def rate(self, dtype: str) -> float:
        """TFLOP/s that one card is assumed to do in a step that computes in ``dtype`` ("fp32", "fp16", "bf16")."""
        return self.published(dtype) * self.utilisation

    def published(self, dtype: str) -> float:
        """TFLOP/s of one card."""
        return self.single if dtype == "fp32" else self.half


CARDS: Mapping[str, Card] = MappingProxyType(
    {
        "4090": Card("4090", 165.2, 82.6, 23.5),
        "a100": Card("a100", 312.0, 19.5, 79.1),  # 80 GB
        "h100": Card("h100", 989.0, 67.0, 79.1),  # SXM
        "h200": Card("h200", 989.0, 67.0, 139.8),
        "l40s": Card("l40s", 362.0, 91.6, 44.5),
    }
)


def find_card(name: str) -> Card:
    """The card that ``name`` means: "4090", "8xh100" for eight, or "tflops:80" for one that does 80 TFLOP/s.

    The rate after "tflops:" is what a step reaches, and is taken as it is, whatever the precision.

    Raises:
        ValueError: no such card; the message names those that are known.
    """
    found = re.fullmatch(r"(?:([1-9]\d{0,4})x)?(?:tflops:(\d+(?:\.\d+)?)|(\w+))", name.lower())
    number, rate, known = (None, None, None) if found is None else found.groups()
    count = int(number or 1)
    if rate is not None and float(rate) > 0:
        return Card(f"tflops:{rate}", float(rate), float(rate), utilisation=1.0, count=count)
    if known is None or known not in CARDS:
        raise ValueError(
            f"card {name!r}: expected one of {', '.join(CARDS)}, or tflops:N for one that does N TFLOP/s in a step; "
            "8xh100 means eight"
        )
    card = CARDS[known]
    return Card(card.name, card.half, card.single, card.memory, card.utilisation, count)
