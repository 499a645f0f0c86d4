"""A studio in a process of its own, and what is sent to it as it stands."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diffusion_align.studio.assembly import assembled
from diffusion_align.studio.labels.label_store import folder_lock
from diffusion_align.studio.launching import begin_labels, listening
from diffusion_align.studio.studio_options import StudioOptions


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Studio:
    """A running studio, as its own page sees it."""

    process: Any
    address: str
    cookie: str = ""
    token: str = ""
    seen: list[Answer] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(urlsplit(self.address).port or 0)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def raw(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        """One request as it stands; the path is not touched."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        sent = {"Host": f"127.0.0.1:{self.port}", **(headers or {})}
        if body is not None:
            sent.setdefault("Content-Length", str(len(body)))
        for name, value in sent.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        found = connection.getresponse()
        answer = Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
        connection.close()
        self.seen.append(answer)
        return answer

    def enter(self) -> None:
        """Take the cookie and the page's token."""
        there = urlsplit(self.address)
        answer = self.raw("GET", f"{there.path}?{there.query}")
        assert answer.status == 303
        self.cookie = answer.headers["set-cookie"].partition(";")[0]
        page = self.get("/label")
        found = re.search(r'data-token="([^"]+)"', page.body.decode())
        assert found is not None
        self.token = found[1]

    def get(self, path: str, **headers: str) -> Answer:
        return self.raw("GET", path, {"Cookie": self.cookie, **headers})

    def write_headers(self) -> dict[str, str]:
        return {
            "Cookie": self.cookie,
            "Origin": self.origin,
            "X-Studio-Token": self.token,
            "Content-Type": "application/json",
            "Sec-Fetch-Site": "same-origin",
        }

    def post(self, action: str, **given: Any) -> Answer:
        return self.raw("POST", f"/api/{action}", self.write_headers(), json.dumps(given).encode())

    def ask(self, action: str, **given: Any) -> Any:
        """The answer of an action that must succeed."""
        answer = self.post(action, **given)
        assert answer.status == 200, answer.body
        return answer.json()


@contextmanager
def studio_here(folder: Path, **options: Any) -> Iterator[Studio]:
    """A studio in a thread of this process, which starts in no time; ``options`` are those of the command."""
    given = StudioOptions(str(folder), **options)
    with folder_lock(folder), listening(given) as (port, listener):
        begin_labels(folder, given)
        with assembled(folder, given, port) as (server, door):
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            running = Studio(None, f"http://127.0.0.1:{port}/?token={door.launch}")
            running.enter()
            yield running
            server.should_exit = True
            thread.join(10)


@contextmanager
def studio(folder: Path, *flags: str, enter: bool = True) -> Iterator[Studio]:
    """A studio on ``folder``; it is ended at the end."""
    command = [sys.executable, "-m", "diffusion_align.cli", "studio", str(folder), "--no-browser", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            process.wait(20)
            raise AssertionError(f"{line}{process.stderr.read() if process.stderr else ''}")
        running = Studio(process, found[0])
        if enter:
            running.enter()
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
