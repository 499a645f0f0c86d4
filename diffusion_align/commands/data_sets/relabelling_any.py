"""``diffusion-align data relabel``: pairs or ranked lists, by what the data set holds."""

from __future__ import annotations

from diffusion_align.commands import relabel
from diffusion_align.commands.console import conclude, note
from diffusion_align.commands.options import RelabelOptions
from diffusion_align.data.beyond_pairs.rescored import Rescoring, rescore
from diffusion_align.data.tables import unit_here
from diffusion_align.devices import pick_device
from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.relabelling import scores_of


def relabel_any(options: RelabelOptions) -> int:
    """Write the new labels, or of ranked lists on this disk the new scores; returns the exit status.

    Raises:
        ValueError: labelled pictures, which a scorer's numbers are no labels of; or an option that lists do not have.
        FileNotFoundError, OSError: as ``load_scorer`` and ``rescore``.
    """
    try:
        unit = unit_here(options.source, options.split)
    except (OSError, ValueError):
        unit = None  # of pairs, whose reader says what is wrong
    if unit == "labelled pictures":
        raise ValueError(
            f"{options.source} holds labelled pictures: scores say which of two pictures of a prompt is better, not "
            "which are good; expected pairs or ranked lists"
        )
    if unit != "ranked lists":
        return relabel.run(options)
    for name in ("tie_margin", "temperature", "streaming"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} is for pairs, and {options.source} holds ranked lists")
    task = Rescoring(options.source, options.split, options.scorer, options.max_pairs, options.seed, options.shard_size)
    scorer = load_scorer(options.scorer, options.checkpoint, device=pick_device(options.device))
    found = rescore(task, scores_of(scorer), options.out, max_corrupt=options.max_corrupt, progress=note)
    counts = (
        f"{found['lists']:.0f} lists: of {found['ordered pairs']:.0f} pairs of pictures that were ordered before, "
        f"{100 * found['agreeing']:.1f}% are ordered alike; {found['unreadable']:.0f} lists unreadable"
    )
    conclude(f"{counts}\n{options.out}", {"out": options.out, **found})
    return 0
