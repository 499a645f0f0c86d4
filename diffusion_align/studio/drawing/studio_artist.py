"""The server's end of the drawing process: starts it when there is something to draw, and again after a crash."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from .artist import work
from .orders import Ended, Order, Told


@dataclass
class StudioArtist:
    """One process at most; orders are drawn one after another.

    Attributes:
        heard: is told what becomes of orders, by a thread.
        idle: seconds without an order after which the process ends, and its memory is given back.
    """

    home: Path
    idle: float
    heard: Callable[[Told], None]
    _process: BaseProcess | None = None
    _connection: Connection | None = None
    _open: list[Order] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _wanted: Synchronized[int] | None = None

    def order(self, order: Order) -> None:
        """Draw; what was ordered before is cancelled."""
        with self._lock:
            if self._process is None or not self._process.is_alive():
                self._start()
            assert self._connection is not None
            assert self._wanted is not None
            self._wanted.value = order.number
            self._open.append(order)
            self._connection.send(order)

    def cancel(self) -> None:
        """Draw nothing further; the process stops between two steps."""
        with self._lock:
            if self._wanted is not None:
                self._wanted.value = -1

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None and self._process.is_alive():
                self._process.kill()
                self._process.join(5)

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return None if self._process is None or not self._process.is_alive() else self._process.pid

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")  # the server's threads are in no fork
        self._connection, theirs = context.Pipe()
        self._wanted = context.Value("q", -1)
        arguments = (theirs, self._wanted, str(self.home), self.idle)
        self._process = context.Process(target=work, args=arguments, name="studio-artist", daemon=True)
        self._process.start()
        theirs.close()
        self._open = []
        threading.Thread(target=self._listen, args=(self._connection, self._process), daemon=True).start()

    def _listen(self, connection: Connection, process: BaseProcess) -> None:
        while True:
            try:
                told = connection.recv()
            except (EOFError, OSError):
                break
            if isinstance(told, Ended):
                with self._lock:
                    self._open = [order for order in self._open if order.number != told.order]
            self.heard(told)
        process.join(10)
        with self._lock:
            lost, self._open = (self._open, []) if process is self._process else ([], self._open)
        for order in lost:
            code = process.exitcode
            how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
            self.heard(
                Ended(order.number, error=f"The drawing process ended ({how}). The next picture starts a new one.")
            )
