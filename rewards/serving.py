"""The other side of ``RemoteScorer``: one scorer behind HTTP."""

from __future__ import annotations

import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from .protocol import RewardOutput, RewardScorer
from .wire import DESCRIBE, SCORE, VERSION, WireError, answer_bytes, read_request

#: Names of this machine alone.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: Bytes of the largest request: 80 pictures of 1024 px.
LARGEST = 2**30


class ScorerServer(ThreadingHTTPServer):
    """Serves ``scorer``; requests wait for each other, and large ones are scored ``batch_size`` pictures at once.

    Args:
        host, port: address; port 0 takes a free one (``server_port``).
        token: secret that every request must carry; "" asks for none.

    Raises:
        ValueError: an address that others reach, without a token.
        OSError: the address is taken.
    """

    daemon_threads = True

    def __init__(
        self, scorer: RewardScorer, host: str = "127.0.0.1", port: int = 8765, token: str = "", batch_size: int = 32
    ) -> None:
        if host not in LOOPBACK and not token:
            raise ValueError(
                f"host {host} can be reached from other machines: expected a secret in DIFFUSION_ALIGN_TOKEN, "
                "or the host 127.0.0.1"
            )
        self.scorer, self.token, self.batch_size, self.lock = scorer, token, batch_size, threading.Lock()
        super().__init__((host, port), Handler)

    def describe(self) -> dict[str, Any]:
        """What a client must know before it asks."""
        return {
            "version": VERSION,
            "name": self.scorer.name,
            "needs": sorted(self.scorer.needs),
            "higher_is_better": self.scorer.higher_is_better,
            "statistics": self.scorer.statistics,
        }

    @torch.no_grad()
    def score(self, images: Any, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        """One request's scores."""
        outputs = []
        with self.lock:
            for start in range(0, max(len(prompts), 1), self.batch_size):
                part = slice(start, start + self.batch_size)
                given = {name: value[part] for name, value in context.items()}
                outputs.append(self.scorer.score(images[part], prompts[part], **given))
        return RewardOutput.cat(outputs)


class Handler(BaseHTTPRequestHandler):
    """Two addresses: what the scorer is, and its scores. Every refusal says why."""

    server: ScorerServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        refusal = self._refused()
        if refusal is not None or self.path != DESCRIBE:
            return self._answer(*(refusal or (404, f"nothing is at {self.path}")))
        return self._answer(200, json.dumps(self.server.describe()), "application/json")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        if length > LARGEST:
            self.close_connection = True
            return self._answer(413, f"{length} bytes are too many: expected at most {LARGEST}; send fewer pictures")
        content = self.rfile.read(length)
        refusal = self._refused()
        if refusal is not None or self.path != SCORE:
            return self._answer(*(refusal or (404, f"nothing is at {self.path}")))
        try:
            output = self.server.score(*read_request(content))
        except (WireError, ValueError) as error:
            return self._answer(400, str(error))
        except Exception as error:  # the client's run must hear of it, whatever it is
            return self._answer(500, f"{type(error).__name__}: {error}")
        return self._answer(200, answer_bytes(output), "application/octet-stream")

    def _refused(self) -> tuple[int, str] | None:
        """Status and reason where a request must not be answered."""
        expected = f"Bearer {self.server.token}"
        if self.server.token and not hmac.compare_digest(self.headers.get("Authorization", ""), expected):
            return 401, "expected the server's secret: set DIFFUSION_ALIGN_TOKEN"
        host = self.headers.get("Host", "").rsplit(":", 1)[0].strip("[]")
        if not self.server.token and host not in LOOPBACK:  # a web page whose name was made to lead here
            return 403, f"host {host!r}: expected one of {', '.join(LOOPBACK)}"
        return None

    def _answer(self, status: int, content: str | bytes, kind: str = "text/plain; charset=utf-8") -> None:
        body = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: a run asks thousands of times."""
