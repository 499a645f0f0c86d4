"""What the Runs page asks for: runs below the roots, their metrics as they grow, and two of them side by side."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from diffusion_align.studio.sources.keyed import opaque
from diffusion_align.studio.sources.units import Picture

from .picture_catalogue import Catalogue, Entry

CONFIG, METRICS, REPORT = "config.yaml", "metrics.jsonl", "report.html"
#: Folders below the roots that are looked into.
DEPTH = 4
#: A run whose file grew within so many of its usual pauses between log lines is running.
PAUSES = 2
#: Seconds that a run may be silent at least, e.g. while it validates, before it counts as ended.
LEAST_SILENCE = 30.0
#: Points of a curve that are sent.
MOST_POINTS = 600
#: What runs of the preference losses start at: log 2.
PREFERENCE_METHODS = ("dpo", "inpo", "online-dpo")
#: Alarms about single figures of validation pictures begin so.
FIGURE = "alarm/picture_"
#: Not settings.
RECORDS = ("versions", "git_commit", "method")


@dataclass
class MetricTail:
    """Lines of a metrics.jsonl, read on from where it was read before.

    Attributes:
        rows: all whole lines so far.
        damaged: how many lines could not be read.
    """

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0
    offset: int = 0
    inode: int = 0
    times: list[float] = field(default_factory=list)

    def update(self) -> bool:
        """Read what is new; True if anything is. A run that is resumed writes the file anew: then all is read again.

        A last line without an end is left for the next time.
        """
        try:
            found = self.path.stat()
        except OSError:
            return False
        if found.st_size < self.offset or found.st_ino != self.inode:
            self.rows, self.damaged, self.offset, self.inode = [], 0, 0, found.st_ino
        if found.st_size == self.offset:
            return False
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                float(row["step"])
                self.rows.append(row)
            except (ValueError, KeyError, TypeError, RecursionError):
                self.damaged += 1
        self.offset += len(whole)
        self.times = [*self.times[-7:], found.st_mtime]
        return bool(whole)

    def running(self, now: float) -> bool:
        """Whether the file grew lately, by its own pace."""
        try:
            silence = now - self.path.stat().st_mtime
        except OSError:
            return False
        pauses = [late - early for early, late in zip(self.times, self.times[1:], strict=False) if late > early]
        return silence < PAUSES * max([LEAST_SILENCE / PAUSES, *pauses])


@dataclass
class RunDesk:
    """Runs by an id that says nothing of their path."""

    home: Path
    catalogue: Catalogue
    _tails: dict[Path, MetricTail] = field(default_factory=dict)
    _folders: dict[str, Path] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def listed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All runs, the one that changed last first."""
        with self._lock:
            self._find()
            runs = [self._short(name, folder) for name, folder in self._folders.items()]
        return {"runs": sorted(runs, key=lambda run: -run["changed"])}

    def detail(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Curves, pictures, settings, checkpoints and alarms of one run."""
        name, folder = self._asked(given, "run")
        with self._lock:
            tail = self._tail(folder)
            config = read_config(folder)
            last = tail.rows[-1] if tail.rows else {}
            return {
                **self._short(name, folder),
                "config": settings_of(config),
                "versions": {key: str(value) for key, value in (config.get("versions") or {}).items()},
                "commit": config.get("git_commit"),
                "curves": curves(tail.rows),
                "alarms": alarms_of(tail.rows),
                "damaged": tail.damaged,
                "preference": config.get("method") in PREFERENCE_METHODS,
                "samples": self._samples(folder),
                "checkpoints": sorted(
                    (path.name for path in folder.glob("checkpoint-*") if path.is_dir()),
                    key=lambda text: (len(text), text),
                ),
                "report": (folder / REPORT).is_file(),
                "last": {key: value for key, value in last.items() if isinstance(value, int | float)},
            }

    def compare(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings in which two runs differ, defaults folded in, and their pictures at equal steps."""
        folders = [self._asked(given, key)[1] for key in ("run", "other")]
        with self._lock:
            both = [folded(folder) for folder in folders]
            names = sorted({*both[0], *both[1]})
            samples = [{one["step"]: one["picture"] for one in self._samples(folder)} for folder in folders]
            return {
                "differences": [
                    {"name": name, "values": [_shown(config.get(name)) for config in both]}
                    for name in names
                    if both[0].get(name) != both[1].get(name)
                ],
                "same": sum(both[0].get(name) == both[1].get(name) for name in names),
                "samples": [
                    {"step": step, "pictures": [there[step] for there in samples]}
                    for step in sorted(samples[0].keys() & samples[1].keys())
                ],
                "curves": [curves(self._tail(folder).rows) for folder in folders],
            }

    def report(self, name: str) -> bytes:
        """A run's report.html.

        Raises:
            LookupError: no such run, it has none, or that lies outside the roots. OSError: it cannot be read.
        """
        path = (self._asked({"run": name}, "run")[1] / REPORT).resolve()  # wherever a link leads now
        if not (path.is_file() and self.catalogue.holds(path)):
            raise LookupError("this run has no report")
        return path.read_bytes()

    def changed(self) -> list[str]:
        """Ids of known runs whose metrics have grown since the last call."""
        with self._lock:
            return [name for name, folder in self._folders.items() if self._tail(folder, update=False).update()]

    def _find(self) -> None:
        todo = [(root, 0) for root in self.catalogue.roots if root.is_dir()]
        found: dict[str, Path] = {}
        while todo:
            place, depth = todo.pop()
            if (place / CONFIG).is_file() and (place / METRICS).is_file():
                found[opaque("run", place)] = place
                continue
            if depth < DEPTH:
                try:
                    todo += [
                        (path, depth + 1)
                        for path in place.iterdir()
                        if path.is_dir() and not path.name.startswith(".") and self.catalogue.holds(path)
                    ]
                except OSError:
                    continue
        self._folders = found

    def _asked(self, given: Mapping[str, Any], key: str) -> tuple[str, Path]:
        name = str(given.get(key))
        if name not in self._folders:
            with self._lock:
                self._find()
        if name not in self._folders:
            raise LookupError("no such run")
        return name, self._folders[name]

    def _tail(self, folder: Path, update: bool = True) -> MetricTail:
        tail = self._tails.setdefault(folder, MetricTail(folder / METRICS))
        if update:
            tail.update()
        return tail

    def _short(self, name: str, folder: Path) -> dict[str, Any]:
        """One line of the list."""
        tail, config = self._tail(folder), read_config(folder)
        wins = [row["eval/win_rate"] for row in tail.rows if isinstance(row.get("eval/win_rate"), int | float)]
        changed = tail.path.stat().st_mtime if tail.path.is_file() else 0.0
        begun = (folder / CONFIG).stat().st_mtime if (folder / CONFIG).is_file() else changed
        where = folder.relative_to(self.home) if folder.is_relative_to(self.home) else folder
        return {
            "id": name,
            "name": str(where) if str(where) != "." else folder.name,
            "method": config.get("method"),
            "running": tail.running(time.time()) and not (folder / REPORT).is_file(),
            "step": tail.rows[-1]["step"] if tail.rows else 0,
            "steps": config.get("max_steps"),
            "win_rate": wins[-1] if wins else None,
            "seconds": max(0.0, changed - begun),
            "changed": changed,
            "alarms": len(alarms_of(tail.rows)),
        }

    def _samples(self, folder: Path) -> list[dict[str, Any]]:
        """Validation pictures by step."""
        found: list[dict[str, Any]] = []
        for path in (folder / "samples").glob("step-*.png"):
            number = path.stem.removeprefix("step-")
            if number.isdigit() and self.catalogue.holds(path):
                picture = self.catalogue.add(Entry((Picture(path, name=path.name),), 0, lossless=True))
                found.append({"step": int(number), "picture": picture})
        return sorted(found, key=lambda one: one["step"])


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.yaml; {} if it cannot be read, e.g. while it is written."""
    try:
        found = yaml.safe_load((folder / CONFIG).read_bytes())
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def settings_of(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """Settings as they stand in a config."""
    return [{"name": name, "value": _shown(value)} for name, value in config.items() if name not in RECORDS]


def folded(folder: Path) -> dict[str, Any]:
    """Settings of a run with the defaults of those that its config does not name, as of other versions; as they stand
    where they are not this version's."""
    from diffusion_align.training.settings import load_run

    try:
        config = load_run(folder)
    except ValueError:
        config = None
    if config is None:
        return {name: value for name, value in read_config(folder).items() if name not in ("versions", "git_commit")}
    found = dataclasses.asdict(config) | {"method": config.method}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def curves(rows: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """(step, value) of every metric; of long runs every n-th point and the last."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append([row["step"], value])
    return {name: points if len(points) <= MOST_POINTS else _thinned(points) for name, points in found.items()}


def alarms_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Alarms of the artefact monitor and of other watches, each with the first step of its last appearance. Artefacts
    are told by their figures, where those are named."""
    found: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("alarm/"):
                if value:
                    found.setdefault(name, row["step"])
                else:
                    found.pop(name, None)
    if any(name.startswith(FIGURE) for name in found):
        found.pop("alarm/artefacts", None)
    return [
        {"name": name.replace(FIGURE, "artefact ").removeprefix("alarm/"), "step": step} for name, step in found.items()
    ]


def _thinned(points: list[list[float]]) -> list[list[float]]:
    every = -(-len(points) // MOST_POINTS)
    return [*points[:-1:every], points[-1]]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "–" if value is None else str(value)
