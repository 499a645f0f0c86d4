"""From how a side is written to what it is: a model with its settings, or pictures that are there already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from diffusion_align.adapters.lora_files import find_lora_file, opened
from diffusion_align.adapters.policy_files import OTHER_BASE, Source, base_of
from diffusion_align.commands.options import GenerateOptions
from diffusion_align.commands.parsing import unknown
from diffusion_align.evaluation.arena import SideText
from diffusion_align.files import read_object, sha256_of
from diffusion_align.pictures import SUFFIXES
from diffusion_align.shipped import SHIPPED_MODELS
from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.policy.model_options import ModelOptions
from diffusion_align.training.settings import load_run

from .comparison_options import EvaluateOptions

#: Flags of generate that all sides share, or that a comparison sets itself.
SHARED = frozenset(
    {"prompt", "prompts", "out", "num_images", "seed", "image", "mask", "batch_size", "device", "overwrite"}
)
DEFAULT_MODEL = "scenes-sdxl"
#: Parts of a pipeline's folder or hub repository, and of a LoRA's.
INDEX, LORA = "model_index.json", "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        text: as it was written, without its name.
        drawing: how its pictures are drawn; None: they are in ``folder``.
        run: settings of the run that trained it, where there is one.
        weights: SHA-256 by file of the trained weights; of a hub model or the base what names it.
    """

    name: str
    text: str
    drawing: GenerateOptions | None = None
    folder: Path | None = None
    run: RunConfig | None = None
    weights: Mapping[str, str] | None = None


def open_sides(texts: Sequence[SideText], options: EvaluateOptions) -> list[Side]:
    """What each side is; nothing is loaded.

    Raises:
        FileNotFoundError: neither here nor on the hub.
        ValueError: a setting that is none, or that cannot be this side's.
    """
    runs = [run for text in texts if (run := _run(text.what)) is not None]
    trained = next((run for run in runs if isinstance(run, TrainConfig)), None)
    common = options if options.model or trained is None else replace(options, **_model_of(trained))
    if not common.model:
        common = replace(common, model=DEFAULT_MODEL)
    return [_side(text, common, bool(options.model)) for text in texts]


def _side(text: SideText, common: EvaluateOptions, chosen: bool) -> Side:
    """One side.

    Args:
        chosen: ``--model`` was given, so that it holds for runs, too.
    """
    what = text.what
    shared: dict[str, Any] = {part.name: getattr(common, part.name) for part in fields(ModelOptions)}
    shared |= {"num_inference_steps": common.num_inference_steps, "guidance_scale": common.guidance_scale}
    shared |= {"batch_size": common.batch_size, "device": common.device, "prompt": "-"}
    if what == "base":
        return _drawn(text, shared, {})
    path = Source.parse(what).path
    if _pictures(path):
        if text.settings:
            raise ValueError(f"side {text.name}: {what} is a folder of pictures, which takes no settings")
        return Side(text.name, str(text), folder=path)
    run = _run(what)
    if run is not None:
        if not isinstance(run, TrainConfig):
            raise ValueError(f"side {text.name}: {what} is a run of {run.method}, which trains no diffusion model")
        shared |= {} if chosen else _model_of(run)
        return _drawn(text, shared | {"lora": _weights(what, run)}, hashes(path), run)
    if path.is_file() and not _is_lora(path):
        return _drawn(text, shared | {"model": what}, {path.name: sha256_of(path)})
    if path.exists() and (path / INDEX).is_file():
        return _drawn(text, shared | {"model": what}, {})
    if path.exists():
        if find_lora_file(path) is None and not any(path.rglob("config.json")):
            raise FileNotFoundError(
                f"side {text.name}: {what} holds neither a run, a LoRA, a pipeline nor pictures ({', '.join(SUFFIXES)})"
            )
        return _drawn(text, shared | {"lora": (what,)}, hashes(path))
    if what in SHIPPED_MODELS:
        return _drawn(text, shared | {"model": what}, {})
    return _of_hub(text, shared)


def _of_hub(text: SideText, shared: dict[str, Any]) -> Side:
    """A pipeline of the hub, or a LoRA for the common model."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = text.what
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"side {text.name}: {name}: no such file or folder; {unknown('model', name, _known())}")
    try:
        file = Path(hf_hub_download(name, LORA))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        file = None
    except HFValidationError:
        raise FileNotFoundError(f"side {text.name}: {name}: neither a file nor a hub name") from None
    if file is not None:
        return _drawn(text, shared | {"lora": (str(file),)}, {name: sha256_of(file)})
    try:
        hf_hub_download(name, INDEX)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"side {text.name}: {name} is neither here nor to be had from the hub, as {LORA} or {INDEX} "
            f"({type(error).__name__})"
        ) from None
    return _drawn(text, shared | {"model": name}, {})


def _drawn(text: SideText, shared: dict[str, Any], weights: Mapping[str, str], run: RunConfig | None = None) -> Side:
    """A side that is drawn, with its own settings on top of the shared ones."""
    own = settings(text)
    drawing = GenerateOptions(**(shared | own))
    try:
        drawing.check()
    except ValueError as error:
        raise ValueError(f"side {text.name}: {error}") from None
    told = {"model": drawing.model} | dict(weights)
    return Side(text.name, str(text), drawing, None, run, told)


def settings(text: SideText) -> dict[str, Any]:
    """A side's own settings as flags of generate; of several values A+B+C.

    Raises:
        ValueError: no such setting (the nearest is named), or a value that it cannot have.
    """
    found: dict[str, Any] = {}
    for key, value in text.settings:
        if key not in _hints():
            raise ValueError(f"side {text.name}: {unknown('setting', key, _hints())}")
        given = tuple(value.split("+")) if "tuple" in str(_hints()[key]) else None if value == "none" else value
        try:
            found[key] = TypeAdapter(_hints()[key]).validate_python(given)
        except ValidationError as error:
            told = error.errors()[0]["msg"]
            raise ValueError(f"side {text.name}: {key}={value} is wrong: {told}") from None
    return found


@cache
def _hints() -> dict[str, Any]:
    hints = get_type_hints(GenerateOptions)
    return {part.name: hints[part.name] for part in fields(GenerateOptions) if part.name not in SHARED}


def _known() -> list[str]:
    return ["base", *SHIPPED_MODELS]


@cache
def _run(what: str) -> RunConfig | None:
    path = Source.parse(what).path
    return load_run(path) if path.is_dir() else None


def _model_of(run: TrainConfig) -> dict[str, Any]:
    """The model that a run trained, but for its precision, which is that of training."""
    return {part.name: getattr(run, part.name) for part in fields(ModelOptions) if part.name != "dtype"}


def _weights(what: str, run: TrainConfig) -> tuple[str, ...]:
    """What is loaded for a run: its weights, and before them those that it started from, where its file needs them."""
    file = find_lora_file(Source.parse(what).path)
    needs = file is not None and run.init_weights is not None and base_of(file) == OTHER_BASE
    return (str(run.init_weights), what) if needs else (what,)


def _pictures(path: Path) -> bool:
    """Whether a folder is one of pictures; a run's has some, too, those of its report."""
    if not path.is_dir() or (path / "config.yaml").is_file() or (path / INDEX).is_file() or find_lora_file(path):
        return False
    return any(file.suffix.lower() in SUFFIXES for file in path.iterdir())


def _is_lora(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    with opened(path) as content:
        return any("lora" in key.lower() or "hada" in key or "lokr" in key for key in content.keys())  # noqa: SIM118


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of the weights in a file or folder, by name."""
    file = find_lora_file(path)
    files = [file] if file is not None else sorted(path.glob("*/*.safetensors"))
    return {each.name if each is file else str(each.relative_to(path)): sha256_of(each) for each in files}


def trained_on(side: Side, scorers: Sequence[str]) -> dict[str, str]:
    """Which of ``scorers`` the side has learned from or was chosen by, and where that is said."""
    run = side.run
    if run is None:
        return {}
    named: dict[str, str] = {}
    for key in ("scorers", "relabel_with", "teacher"):
        given = getattr(run, key, None)
        for name in given if isinstance(given, tuple | list) else [given] if given else []:
            named.setdefault(_key(name), f"{key} of its config")
    if getattr(run, "early_stopping_patience", 0) or Path(side.text.partition("@")[0]).name == "best":
        chosen = getattr(run, "validation_scorer", None)
        if chosen:
            named.setdefault(_key(chosen), "its weights were chosen by it")
    dataset = getattr(run, "dataset", None)
    for name in annotators(Path(dataset)) if dataset else ():
        named.setdefault(_key(name), f"it labelled {dataset}")
    return {name: named[_key(name)] for name in scorers if _key(name) in named}


def annotators(folder: Path) -> list[str]:
    """Scorers that labelled a data set of ``annotate`` or ``data relabel``, as its folder says."""
    found: list[str] = []
    if (folder / "rows.jsonl").is_file():
        with (folder / "rows.jsonl").open() as file:
            header = json.loads(file.readline() or "{}")
        found += [str(entry).rpartition("=")[2] for entry in header.get("scorers", [])]
    if (folder / "labels.json").is_file():
        task = read_object(folder / "labels.json").get("task", {})
        found += [str(task["scorer"])] if "scorer" in task else []
    return found


def _key(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def described(side: Side) -> dict[str, Any]:
    """A side as JSON, for records."""
    drawing = side.drawing
    settings = {} if drawing is None else {
        part.name: getattr(drawing, part.name) for part in fields(GenerateOptions) if part.name not in SHARED
    }  # fmt: skip
    return json.loads(json.dumps({  # tuples become lists, as they are read back
        "name": side.name, "side": side.text, "settings": settings, "weights": side.weights or {},
        "folder": None if side.folder is None else str(side.folder),
    }))  # fmt: skip
