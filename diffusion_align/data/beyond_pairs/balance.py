"""What is worth knowing of labelled pictures and of lists before a run: counts, and what would mislead a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Summary:
    """What is said of a data set beside what is left out.

    Attributes:
        counts: by name.
        warnings: a line each.
    """

    counts: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Counts that are not 0 in one line, then the warnings."""
        counts = ", ".join(f"{count:,} {name}" for name, count in self.counts.items() if count)
        return [*([counts] if counts else []), *(f"warning: {text}" for text in self.warnings)]


def labelled_summary(captions: Sequence[str], labels: Sequence[float], pictures: Sequence[str] | None) -> Summary:
    """Of labelled pictures.

    Args:
        captions, labels: one for each.
        pictures: equal texts where pictures are the same; None where that is not known.
    """
    liked = {caption for caption, label in zip(captions, labels, strict=True) if label > 0}
    disliked = {caption for caption, label in zip(captions, labels, strict=True) if label < 0}
    counts = {
        "liked": sum(label > 0 for label in labels),
        "disliked": sum(label < 0 for label in labels),
        "captions with both": len(liked & disliked),
        "captions with liked ones only": len(liked - disliked),
        "captions with disliked ones only": len(disliked - liked),
    }
    warnings = []
    if not liked or not disliked:
        there, lacks = ("liked", "disliked") if liked else ("disliked", "liked")
        warnings.append(
            f"all {len(labels):,} pictures are {there}, none is {lacks}: there is nothing to tell them from, and the "
            "loss can be lowered by any change"
        )
    elif not liked & disliked:
        warnings.append(
            f"no caption has both liked and disliked pictures ({len(liked):,} have liked ones only, {len(disliked):,} "
            "disliked ones only): the model may learn where pictures come from in place of what makes them good"
        )
    if pictures is not None:
        sides: dict[str, set[bool]] = {}
        for name, label in zip(pictures, labels, strict=True):
            sides.setdefault(name, set()).add(label > 0)
        again, both = len(pictures) - len(sides), sum(len(side) == 2 for side in sides.values())
        counts["the same as another"] = again
        counts["liked and disliked at once"] = both
        if both:
            warnings.append(f"{both:,} pictures are liked in one place and disliked in another")
    return Summary(counts, tuple(warnings))


def list_summary(lengths: Mapping[int, int]) -> Summary:
    """Of lists, by how many there are of each number of pictures."""
    return Summary({f"lists of {length}": count for length, count in sorted(lengths.items())})
