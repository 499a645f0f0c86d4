"""What the Label page asks for: tasks, the next pictures, verdicts, undo, the summary and the export."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, cast, get_args

from diffusion_align.evaluation.stats import win_rate
from diffusion_align.studio.labels.agreement import (
    Figure,
    cohen_kappa,
    krippendorff_alpha,
    over_prompts,
    percent_agreement,
    ratings,
    self_agreement,
)
from diffusion_align.studio.labels.label_queue import LabelQueue, Visit
from diffusion_align.studio.labels.label_store import LabelFile, checked_name, counted, read_labels
from diffusion_align.studio.labels.label_tasks import TASK, Task, begin_task, open_task, settings_from
from diffusion_align.studio.labels.many_at_once import contradictions
from diffusion_align.studio.labels.merged_votes import Merge, answers
from diffusion_align.studio.labels.pickapic_export import write_export

from .picture_catalogue import Catalogue

#: Visits that are handed out together, so that the next pictures are there when they are needed.
AHEAD = 6


@dataclass
class _Seat:
    """One annotator at one task; ``handed`` are the visits that are on their screen or next on it."""

    queue: LabelQueue
    handed: dict[str, Visit] = field(default_factory=dict)


@dataclass
class LabelDesk:
    """All folders of labels in one folder. One thread at a time writes.

    Attributes:
        home: the studio's folder.
        first: name of the folder of labels that the page opens with.
        annotator: who labels where the page does not say.
    """

    home: Path
    catalogue: Catalogue
    first: str = "labels"
    annotator: str = "annotator"
    _tasks: dict[str, Task] = field(default_factory=dict)
    _seats: dict[tuple[str, str], _Seat] = field(default_factory=dict)
    _lock: RLock = field(default_factory=RLock)

    def tasks(self) -> dict[str, Any]:
        """Names of all tasks, the one to open with, and who labels."""
        names = sorted(path.parent.name for path in self.home.glob(f"*/{TASK}"))
        return {"tasks": names, "first": self.first, "annotator": self.annotator}

    def begin(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A new folder of labels.

        Raises:
            ValueError, FileNotFoundError: settings or sources that cannot be used.
            LookupError: sources outside the roots.
        """
        name = checked_name(str(given.get("name") or self.first))
        values = {key: value for key, value in given.items() if key != "name"}
        settings = settings_from(values, "task")
        places = [place if (place := Path(text)).is_absolute() else self.home / place for text in settings.sources]
        for place in places:
            if not self.catalogue.holds(place):
                raise LookupError(f"{place} lies outside the folders that the studio was started with")
        settings = dataclasses.replace(settings, sources=tuple(str(place) for place in places))
        with self._lock:
            if (self.home / name / TASK).is_file():
                raise ValueError(f"{name}: this folder has labels of another task: give another name")
            self._tasks[name] = begin_task(self.home / name, settings)
        return {"name": name}

    def next(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Where an annotator is, and the next visits."""
        with self._lock:
            return self._state(self._seat(given))

    def verdict(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a verdict and go on; one that was kept before changes nothing.

        Raises:
            LookupError: the visit was handed out by nobody, e.g. in another tab that took it back.
            ValueError: it is no answer. OSError: it cannot be written.
        """
        with self._lock:
            seat = self._seat(given)
            name = str(given.get("visit"))
            if name in seat.queue.file.ids():
                return self._state(seat)
            if name not in seat.handed:
                self._state(seat)  # a page from before a restart
            if name not in seat.handed:
                raise LookupError("this pair is not on your list any more: load the page again")
            seat.queue.answer(seat.handed[name], given)
            return self._state(seat)

    def undo(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Take back the last verdict and show its pictures again."""
        with self._lock:
            seat = self._seat(given)
            undone = seat.queue.file.undo()
            return {**self._state(seat), "undone": undone is not None}

    def summary(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the labels say so far. Only here is anything said about where pictures come from."""
        with self._lock:
            task = self._task(given)
            if not any(task.folder.glob("*.jsonl")):
                return {"rule": task.rule, "units": len(task.units), "annotators": {}, "together": {}, "models": []}
            labels = read_labels(task.folder)
            people = {}
            for name, verdicts in labels.items():
                own = self_agreement(verdicts)
                people[name] = {
                    **counted(verdicts),
                    "repeats": own.repeats,
                    "agreed": own.agreed,
                    "left": None if own.left is None else own.left.to_json(),
                    "circles": [
                        {"prompt": unit.prompt, "pictures": circles}
                        for key, circles in contradictions(verdicts).items()
                        if (unit := task.unit(key)) is not None
                    ],
                }
            return {
                "rule": task.rule,
                "units": len(task.units),
                "annotators": people,
                "together": dict(_together(task, [ratings(verdicts) for verdicts in labels.values()])),
                "models": _models(task, labels),
            }

    def export(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Write the labels as parquet below the studio's folder."""
        with self._lock:
            task = self._task(given)
            merge = given.get("merge", "majority")
            if merge not in get_args(Merge):
                raise ValueError(f"merge {merge!r}: expected one of {', '.join(get_args(Merge))}")
            name = checked_name(str(given.get("out") or f"{task.folder.name}-pairs"))
            told = write_export(task, read_labels(task.folder), self.home / name, cast(Merge, merge))
        return {"folder": name, "text": str(told), "rows": dict(told.rows)}

    def _task(self, given: Mapping[str, Any]) -> Task:
        name = checked_name(str(given.get("task") or self.first))
        if name not in self._tasks:
            self._tasks[name] = open_task(self.home / name)
        return self._tasks[name]

    def _seat(self, given: Mapping[str, Any]) -> _Seat:
        task, annotator = self._task(given), checked_name(str(given.get("annotator") or self.annotator))
        key = (task.folder.name, annotator)
        if key not in self._seats:
            file = LabelFile.open(task.folder, annotator, {"seed": task.settings.seed, "kind": task.settings.kind})
            self._seats[key] = _Seat(LabelQueue(task, file, annotator))
        return self._seats[key]

    def _state(self, seat: _Seat) -> dict[str, Any]:
        """Visits for the page: ids, the prompt and what the task asks; nothing else about a picture."""
        task, queue = seat.queue.task, seat.queue
        taken = self._taken(seat)
        visits = queue.upcoming(AHEAD, taken)
        seat.handed = {visit.id: visit for visit in visits}
        settings = task.settings
        return {
            "visits": [
                {
                    "id": visit.id,
                    "prompt": task.units[visit.place].prompt,
                    "pictures": self.catalogue.shown(
                        [task.units[visit.place].pictures[i] for i in visit.shown], visit.id
                    ),
                }
                for visit in visits
            ],
            "done": len(queue.file.verdicts),
            "left": queue.left(taken),
            "kind": settings.kind,
            "aspects": list(settings.aspects),
            "words": settings.words,
            "annotator": queue.annotator,
        }

    def _taken(self, seat: _Seat) -> set[str]:
        """Units that others have judged or look at."""
        task = seat.queue.task
        for file in task.folder.glob("*.jsonl"):  # also of those who have labelled before this start
            self._seat({"task": task.folder.name, "annotator": file.stem})
        others = [found for (name, _), found in self._seats.items() if name == task.folder.name and found is not seat]
        taken = {visit.unit for other in others for visit in other.handed.values()}
        return taken | {verdict.unit for other in others for verdict in other.queue.file.verdicts}


def _together(task: Task, raters: Sequence[Mapping[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """Agreement of two annotators or more, where they have answered the same."""
    if len(raters) < 2:
        return
    prompts = {item: unit.prompt for rater in raters for item in rater if (unit := task.unit(item[0])) is not None}
    known = [{item: answer for item, answer in rater.items() if item in prompts} for rater in raters]
    yield "percent", _figure(over_prompts(known, prompts, percent_agreement, resamples=500))
    yield "alpha", _figure(over_prompts(known, prompts, krippendorff_alpha, resamples=500))
    if len(raters) == 2:
        yield "kappa", _figure(over_prompts(known, prompts, lambda both: cohen_kappa(*both), resamples=500))


def _figure(figure: Figure) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return None if value != value else value  # NaN is no JSON

    return {
        "value": number(figure.value),
        "interval": [number(value) for value in figure.interval],
        "count": figure.count,
    }


def _models(task: Task, labels: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How often each model's picture was better than another model's; ties are half a win."""
    found, _ = answers(task, labels, "majority")
    wins: Counter[str] = Counter()
    losses: Counter[str] = Counter()
    ties: Counter[str] = Counter()
    for answer in found:
        pictures = task.units[answer.place].pictures
        first, second = pictures[answer.first].model, pictures[answer.second].model
        if first is None or second is None or first == second:
            continue
        if answer.label == 0.5:
            ties.update((first, second))
        else:
            winner, loser = (first, second) if answer.label else (second, first)
            wins[winner] += 1
            losses[loser] += 1
    return [
        {"model": model, **_rate(wins[model], losses[model], ties[model])} for model in sorted({*wins, *losses, *ties})
    ]


def _rate(won: int, lost: int, tied: int) -> dict[str, Any]:
    scores = [1.0] * won + [0.0] * lost + [0.5] * tied
    return win_rate(scores, [1 - score for score in scores]).to_json()
