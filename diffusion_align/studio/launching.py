"""From options to a server that listens."""

from __future__ import annotations

import signal
import socket
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from diffusion_align.files import check_writable

from .labels.label_store import checked_name, folder_lock
from .labels.label_tasks import TASK, TaskSettings, begin_task, open_task
from .studio_options import StudioOptions


def run(options: StudioOptions) -> int:
    """Serve until a signal comes; returns the exit status.

    Raises:
        ValueError, FileNotFoundError: options, sources or labels that cannot be used.
        OSError: another studio has the folder, it cannot be written, or the port is taken.
        ImportError: the extra ``studio`` is not installed.
    """
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise ImportError("the studio needs starlette and uvicorn: pip install 'diffusion-align[studio]'") from None
    from .assembly import assembled

    home = Path(options.folder).resolve()
    check_writable(home)
    with folder_lock(home), listening(options) as (port, listener):
        begin_labels(home, options)
        with assembled(home, options, port) as (server, door):
            address = f"http://{_shown(options.host)}:{port}{options.root_path}/?token={door.launch}"
            print(f"The studio is at {address}\nCtrl-C ends it.", flush=True)
            if not options.no_browser:
                threading.Timer(0.5, webbrowser.open, [address]).start()

            def stop(number: int, frame: FrameType | None) -> None:
                server.should_exit = True

            server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
            signal.signal(signal.SIGTERM, stop)
            server.run(sockets=[listener])
    return 0


@contextmanager
def listening(options: StudioOptions) -> Iterator[tuple[int, socket.socket]]:
    """A socket at the options' address, and its port."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((options.host, options.port))
        except OSError as error:
            raise OSError(f"--port {options.port} cannot be listened at: {error.strerror}") from None
        listener.listen(128)
        yield int(listener.getsockname()[1]), listener


def begin_labels(home: Path, options: StudioOptions) -> None:
    """Begin or check the folder of labels, if sources are given.

    Raises:
        ValueError: it was begun with other settings; ``FileNotFoundError``: a source is not there.
    """
    folder = home / checked_name(options.labels)
    begun = (folder / TASK).is_file()
    if not options.source:
        if begun:
            open_task(folder)
        return
    seed = options.seed
    if seed is None and begun:
        seed = open_task(folder).settings.seed
    settings = TaskSettings(
        tuple(str(Path(source).resolve()) for source in options.source),
        options.kind,
        options.match,
        options.order,
        holdout=options.holdout,
        aspects=options.aspects,
        words=options.words,
        **({} if seed is None else {"seed": seed}),
    )
    begin_task(folder, settings)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
