"""``diffusion-align data relabel``: pairs in, the same pairs with a scorer's verdicts out."""

from __future__ import annotations

from diffusion_align.devices import pick_device
from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.relabelling import Relabelling, relabel, told

from .console import conclude, note
from .options import RelabelOptions


def run(options: RelabelOptions) -> int:
    """Write the new labels and say what became of the old ones; returns the exit status.

    Raises:
        ValueError, FileNotFoundError, OSError: as ``load_scorer`` and ``relabel``.
    """
    task = Relabelling(
        options.source,
        options.split,
        options.scorer,
        options.tie_margin,
        options.temperature,
        options.streaming,
        options.max_pairs,
        options.seed,
        options.shard_size,
    )
    scorer = load_scorer(options.scorer, options.checkpoint, device=pick_device(options.device))
    found = relabel(
        task, scorer, options.out, batch_size=options.batch_size, max_corrupt=options.max_corrupt, progress=note
    )
    conclude(f"{told(found)}\n{options.out}", {"out": options.out, **found})
    return 0
