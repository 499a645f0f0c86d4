"""What the studio is made of, put together: roots, pictures, desks, worker and door."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.types import ASGIApp

from .labels.label_store import checked_name
from .serving.data_desk import DataDesk
from .serving.door import Door
from .serving.event_stream import EventStream
from .serving.label_desk import LabelDesk
from .serving.picture_catalogue import Catalogue
from .serving.studio_app import Parts, build_app
from .studio_options import StudioOptions


@contextmanager
def assembled(home: Path, options: StudioOptions, port: int) -> Iterator[tuple[ASGIApp, Door]]:
    """The application and its door; inside, the worker may run.

    Raises:
        FileNotFoundError: a folder of --data is not there.
    """
    roots = [home, *(Path(place) for place in (*options.data, *options.source))]
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such file or folder")
    catalogue = Catalogue(tuple(root.resolve() for root in roots))
    labels = LabelDesk(home, catalogue, options.labels, annotator_of(options))
    data = DataDesk(home, catalogue)
    door = Door(f"studio-{port}", tuple(name.lower() for name in options.allow_host), options.root_path)
    actions = {
        "label-tasks": lambda given: labels.tasks(),
        "label-begin": labels.begin,
        "label-next": labels.next,
        "label-verdict": labels.verdict,
        "label-undo": labels.undo,
        "label-summary": labels.summary,
        "label-export": labels.export,
        "data-sources": data.sources,
        "data-page": data.page,
        "data-counts": data.counts,
        "data-exclude": data.exclude,
    }
    yield build_app(Parts(door, catalogue, EventStream(), actions)), door


def annotator_of(options: StudioOptions) -> str:
    """Who labels: the option, or the user's name as far as a file can be called so."""
    if options.annotator is not None:
        return checked_name(options.annotator)
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = ""
    return re.sub(r"[^A-Za-z0-9_-]", "", name)[:64] or "annotator"
