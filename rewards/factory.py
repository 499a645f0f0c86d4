"""From a name to a scorer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from diffusion_align.files import verify_folder
from diffusion_align.names import hint
from diffusion_align.shipped import SHIPPED_SCORERS, shipped_path

from .catalogue import ENTRY_POINTS, FACTS
from .protocol import RewardScorer

#: Name to "module:function"; modules are imported when a scorer is asked for.
SCORERS: Mapping[str, str] = MappingProxyType(
    {name: facts.load for name, facts in FACTS.items() if name not in SHIPPED_SCORERS}
)

#: Kind in scorer.json to "module:class".
TRAINED: Mapping[str, str] = MappingProxyType(
    {
        "vp-score": ".trained.vp:VPScore",
        "edit": ".trained.edit:EditScore",
        "pal": ".trained.pal:PALScorer",
        "prefpaint": ".trained.repainting:RepaintingScorer",
    }
)


def load_scorer(
    name: str | Path,
    checkpoint: str | None = None,
    *,
    device: str | torch.device = "cpu",
    **options: object,
) -> RewardScorer:
    """Build the scorer ``name``, frozen and in eval mode.

    Args:
        name: a known name (see docs/rewards.md), that of an installed plug-in (entry points of the group
            "diffusion_align.rewards": a function that takes ``name`` and ``checkpoint``), the folder of a scorer
            that was trained here or of the run that did it, or the address of ``diffusion-align serve-scorer`` ("http://127.0.0.1:8765").
        checkpoint: weights file or folder instead of the published ones.
        options: of the scorer's loader, e.g. ``model="ViT-L-14"`` for "clip".

    Raises:
        ValueError: no such scorer (the message lists the known ones), an option it does not have, or a checkpoint
            whose keys do not fit.
        FileNotFoundError: the weights are not there.
        RemoteError: nobody answers at the address.
    """
    load = _find_loader(str(name))
    known = inspect.signature(load).parameters
    given = dict(options) if checkpoint is None else {"checkpoint": checkpoint, **options}
    for option in given:
        if option not in known:
            expected = ", ".join(sorted(set(known) - {"name"})) or "no options"
            raise ValueError(f"scorer {name} has no option {option!r}: expected {expected}")
    return load(str(name), **given).frozen().to(device)


def known_scorers() -> list[str]:
    """Names that ``load_scorer`` takes, plug-ins included."""
    return sorted({*SCORERS, *SHIPPED_SCORERS, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def _find_loader(name: str) -> Callable[..., RewardScorer]:
    if name in SCORERS:
        loader: Callable[..., RewardScorer] = _resolve(SCORERS[name])
        return loader
    if name in SHIPPED_SCORERS:
        return load_shipped
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            plugin: Callable[..., RewardScorer] = point.load()
            return plugin
    if name.startswith(("http://", "https://")):
        remote: Callable[..., RewardScorer] = _resolve(".remote:load_remote")
        return remote
    if Path(name).is_dir():
        return load_trained
    known = known_scorers()
    raise ValueError(
        f"unknown scorer {name!r}{hint(name, known)}: known scorers are {', '.join(known)}, the folder of a trained "
        "one, or an address (http://...)"
    )


def load_shipped(name: str) -> RewardScorer:
    """A scorer that comes with the package."""
    scorer = load_trained(str(shipped_path(name)))
    scorer.name = name
    return scorer


def load_trained(name: str) -> RewardScorer:
    """The scorer saved in folder ``name``, or by the run or checkpoint that ``name`` is the folder of.

    Raises:
        FileNotFoundError, ValueError: there is no scorer, it is of an unknown kind, its weights do not fit, or a file
            has changed since it was written.
    """
    from .published.clip import OPEN_CLIP_CONFIG, load_clip
    from .trained.scorer import read_config, scorer_folder

    name = str(scorer_folder(name))
    if (Path(name) / OPEN_CLIP_CONFIG).is_file():
        verify_folder(Path(name))
        return load_clip("clip", model=f"local-dir:{name}")

    kind = read_config(Path(name))["kind"]
    if kind not in TRAINED:
        raise ValueError(f"{name}: scorer of unknown kind {kind!r}: expected one of {', '.join(sorted(TRAINED))}")
    scorer: RewardScorer = _resolve(TRAINED[kind]).from_pretrained(name)
    return scorer


def _resolve(address: str) -> Any:
    module, _, attribute = address.partition(":")
    return getattr(import_module(module, __package__), attribute)
