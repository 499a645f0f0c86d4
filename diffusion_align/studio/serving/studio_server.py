"""Uvicorn for the studio: quiet, without names of itself, and open streams end with it."""

from __future__ import annotations

import socket

import anyio.to_thread
import uvicorn
from starlette.types import ASGIApp

from .event_stream import EventStream

#: Requests that are worked on at once; each thread that has decoded pictures keeps some memory.
THREADS = 6


class StudioServer(uvicorn.Server):
    """A server that tells its streams when it ends."""

    def __init__(self, app: ASGIApp, stream: EventStream) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, lifespan="off", proxy_headers=False, server_header=False,
                timeout_graceful_shutdown=3,
            )
        )  # fmt: skip
        self.stream = stream

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.stream.close()
        await super().shutdown(sockets)
