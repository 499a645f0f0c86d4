"""A hub on loopback that keeps what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeHub:
    """What was asked of it.

    Attributes:
        created: bodies of "make a repository".
        files: content by path, of the last commit.
        tokens: that requests carried.
        kept: whether the repository is private already; None: as it is asked for.
    """

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    kept: bool | None = None

    @property
    def private(self) -> bool:
        """Whether only its owner sees the repository."""
        asked = self.created[-1]
        return self.kept if self.kept is not None else bool(asked.get("private", asked.get("visibility") == "private"))


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve one until the end of the block."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            return

        def answer(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path.startswith("/api/models/") and hub.created:
                self.answer({"id": "me/tuned", "private": hub.private})
            else:
                self.answer({"error": "not here"}, 404)

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                hub.created.append(json.loads(body))
                asked = hub.created[-1]
                self.answer({"url": f"{hub.address}/{asked.get('organization', 'me')}/{asked['name']}"})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path.endswith("/preupload/main"):
                asked = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
                self.answer({"files": modes})
            elif path.endswith("/commit/main"):
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
                self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.address}/{repo}/commit/0"})
            else:
                self.answer({"error": f"no such place: {path}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
