"""Pages of the docs site that are made from the classes of options and settings: Markdown text, nothing is written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.methods import METHODS, config_class

from .command_tree import command_classes
from .new_recipe import help_texts

#: The class is wide.css's, which makes a row a block where the window is narrow.
HEAD = "```{{rst-class}} reference\n```\n\n| {} | values | default | what it is |\n|---|---|---|---|"


def commands_page(overview: Mapping[str, str], everywhere: Mapping[str, str]) -> str:
    """Every command with its flags, in Markdown, headings of level 2 and 3.

    Args:
        overview: the words of the command line, each with its line of the help.
        everywhere: flags that every command has, each with its text.
    """
    classes = command_classes()
    parts = ["## Flags of every command", "\n".join(f"- `{flag}`: {text}" for flag, text in everywhere.items())]
    for word, text in overview.items():
        parts += [f"## {word}", f"{_sentence(text)}."]
        for words, options in classes.items():
            if words.split()[0] == word:
                parts += [f"### `diffusion-align {words}`"] if " " in words else []
                parts.append(_command(options))
        if word == "train":
            known = ", ".join(f"[`{method}`](settings.md#{method})" for method in METHODS)
            parts.append(f"Methods, with their settings: {known}.")
    return "\n\n".join(parts)


def settings_page() -> str:
    """Every setting of every method, in Markdown, each class once; headings of level 2."""
    used: dict[type, list[str]] = {}
    parts = []
    for method in METHODS:
        own = list(_with_settings(config_class(method)))
        for cls in own:
            used.setdefault(cls, []).append(method)
        links = ", ".join(f"[{cls.__name__}](#{cls.__name__.lower()})" for cls in own)
        parts += [f"## {method}", f"{_first_line(config_class(method))} Settings: {links}."]
    for cls, methods in used.items():
        by = "all methods" if len(methods) == len(METHODS) else ", ".join(f"`{method}`" for method in methods)
        parts += [f"## {cls.__name__}", f"{_first_line(cls)} Of {by}.", _table(cls, "setting", _declared(cls))]
    return "\n\n".join(parts)


def python_page(module: ModuleType) -> str:
    """Every public name of a module, in Markdown, headings of level 2: how it is called, and its docstring; of a class
    its public methods, too."""
    parts = []
    for name in module.__all__:
        thing = getattr(module, name)
        parts += [f"## {name}", *_told(name, thing)]
        for method, function in _public_methods(thing):
            parts += _told(f"{name}.{method}", function)
    return "\n\n".join(parts)


def _public_methods(thing: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(thing, type):
        return ()
    return [(name, it) for name, it in vars(thing).items() if not name.startswith("_") and inspect.isfunction(it)]


def _told(name: str, thing: Any) -> Iterator[str]:
    """A signature and a docstring, as blocks; of settings the fields are on a page of their own."""
    text = re.sub(r":\w+:`[~.]*([^`]+)`", r"`\1`", inspect.cleandoc(thing.__doc__ or "").replace("``", "`"))
    if isinstance(thing, type) and issubclass(thing, RunConfig):
        yield f"{_cell(text.splitlines()[0])} Its fields: [settings](settings.md#{name.lower()})."
        return
    lines = [_signature(name, thing), *(["", *text.splitlines()] if text else [])]
    yield "\n".join(["```text", *lines, "```"])


def _signature(name: str, thing: Any) -> str:
    """As it is called, an argument to a line where one line does not hold all."""
    try:
        signature = inspect.signature(thing)
    except ValueError:  # of a type alias or of a class that is written in C
        return name
    kept = [argument for argument in signature.parameters.values() if argument.name != "self"]
    signature = signature.replace(parameters=kept)
    if isinstance(thing, type):
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    whole = name + _unquoted(str(signature))
    if len(whole) <= 90:
        return whole
    arguments = [f"    {_unquoted(str(argument))}," for argument in kept]
    end = _unquoted(str(signature.replace(parameters=[]))).removeprefix("(")
    return "\n".join([f"{name}(", *arguments, end])


def _unquoted(signature: str) -> str:
    """Without the quotes of annotations that are not evaluated."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)


def _command(options: type) -> str:
    if options in {config_class(method) for method in METHODS}:
        return f"Its flags are the settings of [`train {options.method}`](settings.md#{options.method})."
    text = _first_line(options)
    return f"{text}\n\n{_table(options, 'flag', list(fields(options)))}" if fields(options) else text


def _with_settings(cls: type) -> Iterator[type]:
    """The classes that declare settings of ``cls``, itself first."""
    return (base for base in cls.__mro__ if is_dataclass(base) and _declared(base))


def _declared(cls: type) -> list[Field[Any]]:
    """Fields that stand in the class itself, new ones and those with another default."""
    return [field for field in fields(cls) if field.name in vars(cls).get("__annotations__", {})]


def _table(cls: type, kind: str, shown: list[Field[Any]]) -> str:
    texts, hints = help_texts(cls), get_type_hints(cls)
    rows = [HEAD.format(kind)]
    for field in shown:
        name = f"--{field.name.replace('_', '-')}" if kind == "flag" else field.name
        cells = (f"`{name}`", values_text(hints[field.name]), _default(field), texts.get(field.name, ""))
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(rows)


def values_text(hint: Any) -> str:
    """What a setting of that type may be, in words."""
    if hint is NoneType:
        return "none"
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(values_text(part) for part in get_args(hint)))
    if get_origin(hint) in (tuple, list):
        parts = [part for part in get_args(hint) if part is not Ellipsis]
        many = get_origin(hint) is list or Ellipsis in get_args(hint)
        return f"any number of: {values_text(parts[0])}" if many else ", then ".join(map(values_text, parts))
    words = {bool: "true, false", int: "whole number", float: "number", str: "text"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _default(field: Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING:
        return "to be given"
    if value is None or value == () or value == "":
        return "none"
    words = value if isinstance(value, tuple | list) else (value,)
    return f"`{' '.join(str(word).lower() if isinstance(word, bool) else str(word) for word in words)}`"


def _cell(text: str) -> str:
    """Text as one cell of a table: no bars, and no signs that Markdown or HTML would take as its own."""
    for sign, safe in (("\n", " "), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("$", "\\$")):
        text = text.replace(sign, safe)
    return text


def _first_line(cls: type) -> str:
    return _cell((cls.__doc__ or "").strip().splitlines()[0])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
