"""What the studio is made of, put together: roots, pictures, desks, worker and door."""

from __future__ import annotations

import getpass
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .labels.label_store import checked_name
from .serving.compare_desk import CompareDesk
from .serving.data_desk import DataDesk
from .serving.door import Door
from .serving.easel import Easel
from .serving.event_stream import EventStream
from .serving.fresh_desk import FreshDesk
from .serving.label_desk import LabelDesk
from .serving.picture_catalogue import Catalogue
from .serving.run_desk import RunDesk
from .serving.studio_app import Parts, build_app
from .serving.studio_server import StudioServer
from .studio_options import StudioOptions

#: Seconds between looks at the runs' metrics.
LOOK = 2.0


@contextmanager
def assembled(home: Path, options: StudioOptions, port: int) -> Iterator[tuple[StudioServer, Door]]:
    """The server and its door; inside, the drawing process may run.

    Raises:
        FileNotFoundError: a folder of --data is not there.
    """
    roots = [home, *(Path(place) for place in (*options.data, *options.source))]
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such file or folder")
    catalogue = Catalogue(tuple(root.resolve() for root in roots), home / ".studio" / "thumbnails")
    labels = LabelDesk(home, catalogue, options.labels, annotator_of(options))
    data = DataDesk(home, catalogue)
    runs = RunDesk(home, catalogue)
    stream = EventStream()
    easel = Easel(home, stream, options.idle * 60)
    compare, fresh = CompareDesk(home, catalogue, easel), FreshDesk(home, catalogue, easel)
    door = Door(f"studio-{port}", tuple(name.lower() for name in options.allow_host), options.root_path)
    actions = {
        "label-tasks": lambda given: labels.tasks(),
        "label-begin": labels.begin,
        "label-next": labels.next,
        "label-verdict": labels.verdict,
        "label-undo": labels.undo,
        "label-summary": labels.summary,
        "label-export": labels.export,
        "fresh-start": fresh.start,
        "fresh-cancel": fresh.cancel,
        "fresh-state": fresh.state,
        "compare-start": compare.start,
        "compare-strength": compare.strength,
        "compare-cancel": compare.cancel,
        "compare-state": compare.state,
        "compare-label": compare.label,
        "compare-grid": compare.save_grid,
        "runs-list": runs.listed,
        "runs-detail": runs.detail,
        "runs-compare": runs.compare,
        "data-sources": data.sources,
        "data-page": data.page,
        "data-counts": data.counts,
        "data-exclude": data.exclude,
    }
    ended = threading.Event()
    threading.Thread(target=watch_runs, args=(runs, stream, ended), daemon=True).start()
    try:
        yield StudioServer(build_app(Parts(door, catalogue, stream, runs.report, actions)), stream), door
    finally:
        ended.set()
        easel.close()


def watch_runs(runs: RunDesk, stream: EventStream, ended: threading.Event) -> None:
    """Tell the pages which runs have grown, as long as any page listens."""
    while not ended.wait(LOOK):
        if stream.heard:
            for name in runs.changed():
                stream.send("run", run=name)


def annotator_of(options: StudioOptions) -> str:
    """Who labels: the option, or the user's name as far as a file can be called so."""
    if options.annotator is not None:
        return checked_name(options.annotator)
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = ""
    return re.sub(r"[^A-Za-z0-9_-]", "", name)[:64] or "annotator"
