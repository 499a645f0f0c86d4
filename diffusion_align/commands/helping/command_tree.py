"""Every command with its options, for scripts that complete them. Classes are named and not imported: a shell waits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from diffusion_align.training.methods import METHODS, config_class

#: Words of a command to its options, "module:class" of the package. ``train`` has its methods, beside them.
ADDRESSES: Mapping[str, str] = MappingProxyType({
    "demo": "commands.options:DemoOptions", "sweep": "commands.sweep.sweep_options:SweepOptions",
    "generate": "commands.options:GenerateOptions", "export": "commands.options:ExportOptions",
    "score": "commands.options:ScoreOptions", "serve-scorer": "commands.options:ServeScorerOptions",
    "scorers": "commands.options:ScorersOptions", "scorers verify": "commands.options:VerifyScorerOptions",
    "annotate": "commands.options:AnnotateOptions",
    "data import": "commands.data_sets.pair_options:ImportOptions",
    "data export": "commands.data_sets.pair_options:PairExportOptions",
    "data check": "commands.data_sets.pair_options:CheckOptions",
    "data dedup": "commands.data_sets.pair_options:DedupOptions",
    "data stats": "commands.data_sets.pair_options:StatsOptions",
    "data split": "commands.data_sets.pair_options:SplitOptions",
    "data relabel": "commands.options:RelabelOptions", "data lists": "commands.data_sets.list_options:ListsOptions",
    "evaluate": "commands.evaluating.comparison_options:EvaluateOptions",
    "evaluate scorer": "commands.evaluating.scorer_options:EvaluateScorerOptions",
    "evaluate guidance": "commands.guiding.guidance_options:EvaluateGuidanceOptions",
    "studio": "studio.studio_options:StudioOptions",
    "card": "commands.sharing.sharing_options:CardOptions", "push": "commands.sharing.sharing_options:PushOptions",
    "cache": "training.pairs.config:DPOConfig",
    "cache verify": "commands.cache.folder_options:VerifyCacheOptions",
    "cache gc": "commands.cache.folder_options:CollectCacheOptions",
    "doctor": "commands.helping.helping_options:DoctorOptions", "init": "commands.helping.helping_options:InitOptions",
    "completion": "commands.helping.helping_options:CompletionOptions",
    "recipes list": "commands.helping.helping_options:ListRecipesOptions",
    "recipes show": "commands.helping.helping_options:ShowRecipeOptions",
    "recipes copy": "commands.helping.helping_options:CopyRecipeOptions",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Attributes:
        name: with its dashes.
        values: that it may have; empty where it takes others, or none.
        is_switch: whether it takes no value.
    """

    name: str
    values: tuple[str, ...] = ()
    is_switch: bool = False


def command_tree() -> dict[str, list[Flag]]:
    """The flags of each command, by its words ("train dpo")."""
    tree = {words: list(flags_of(options)) for words, options in command_classes().items()}
    return tree | {f"train {method}": list(flags_of(config_class(method))) for method in METHODS}


def command_classes() -> dict[str, type]:
    """The class of each command's options, by its words ("data import"); of ``train`` see ``METHODS``."""
    return {words: _class(address) for words, address in ADDRESSES.items()}


def flags_of(options: type) -> Iterator[Flag]:
    """The flags of a class of options, as tyro names them."""
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        name, hint = field.name.replace("_", "-"), hints[field.name]
        if hint is bool:
            yield Flag(f"--{name}", is_switch=True)
            yield Flag(f"--no-{name}", is_switch=True)
        else:
            yield Flag(f"--{name}", tuple(dict.fromkeys(_choices(hint))))


def _choices(hint: Any) -> Iterator[str]:
    """What is said in a ``Literal`` anywhere in a type."""
    if get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
        return
    for part in get_args(hint):
        yield from _choices(part)


def _class(address: str) -> type:
    module, _, name = address.partition(":")
    found: type = getattr(import_module(f"diffusion_align.{module}"), name)
    return found
