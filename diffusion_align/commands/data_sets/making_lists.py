"""``diffusion-align data lists``: pairs in, ranked lists out."""

from __future__ import annotations

from diffusion_align.commands.console import conclude, note
from diffusion_align.data.beyond_pairs.from_pairs import MadeOf, make_lists
from diffusion_align.devices import pick_device
from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.relabelling import scores_of

from .list_options import ListsOptions


def write_lists(options: ListsOptions) -> int:
    """Write the lists and say what they are; returns the exit status.

    Raises:
        ValueError, FileNotFoundError, OSError: as ``load_scorer`` and ``make_lists``.
    """
    task = MadeOf(options.source, options.split, options.scorer, options.shard_size)
    breaker = None
    if options.scorer is not None:
        breaker = scores_of(load_scorer(options.scorer, options.checkpoint, device=pick_device(options.device)))
    found = make_lists(task, options.out, breaker, progress=note)
    counts = ", ".join(f"{count:,} {name}" for name, count in found.items() if count)
    conclude(f"{counts}\n{options.out}", {"out": options.out, **found})
    return 0
