"""Who may ask the studio: this machine's own browser, from the studio's own pages, with this launch's token."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Names of this machine.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
#: Header of every write.
TOKEN_HEADER = "x-studio-token"
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
#: Of a run's report, which somebody else may have written: its pictures and styles are inside it, nothing else is
#: loaded, no script runs, and in its sandbox it has no part in the studio's origin.
REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'; sandbox"
)
#: Of every answer, unless it says so itself.
HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def new_secret() -> str:
    """32 random bytes as text."""
    return secrets.token_urlsafe(32)


@dataclass(frozen=True)
class Door:
    """What lets a request in.

    Attributes:
        cookie: name of the cookie that holds ``launch``; cookies do not tell ports apart, so it has the port in it.
        hosts: further names that the studio is reached by.
        root_path: what a proxy puts before every path.
        launch: secret of the address that is printed; becomes the cookie.
        write: secret of the pages, in the header of every write.
    """

    cookie: str
    hosts: tuple[str, ...] = ()
    root_path: str = ""
    launch: str = field(default_factory=new_secret, repr=False)
    write: str = field(default_factory=new_secret, repr=False)

    def refusal(self, method: str, headers: Headers, cookies: Mapping[str, str]) -> Response | None:
        """Why a request is refused; None lets it in."""
        if host_name(headers.get("host", "")) not in {*LOOPBACK, *self.hosts}:
            return PlainTextResponse("not a name of this studio (--allow-host adds one)", 421)
        if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
            return PlainTextResponse("asked for by another site", 403)
        if not hmac.compare_digest(cookies.get(self.cookie, "").encode(), self.launch.encode()):
            return PlainTextResponse(
                "Open the address that diffusion-align studio printed: it has this launch's token.", 403
            )
        if method in ("GET", "HEAD"):
            return None
        if not self._own(headers.get("origin", ""), headers.get("host", "")):
            return PlainTextResponse("written from another origin", 403)
        if not hmac.compare_digest(headers.get(TOKEN_HEADER, "").encode(), self.write.encode()):
            return PlainTextResponse(f"header {TOKEN_HEADER} is missing or wrong: load the page again", 403)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return PlainTextResponse("expected content-type application/json", 403)
        return None

    def entering(self, path: str, query: str, headers: Headers) -> Response | None:
        """The answer to the address that was printed: a cookie, and the address without its token."""
        given = parse_qs(query).get("token", [""])[0]
        if path != "/" or not given or host_name(headers.get("host", "")) not in {*LOOPBACK, *self.hosts}:
            return None
        if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
            return None
        if not hmac.compare_digest(given.encode(), self.launch.encode()):
            return None
        answer = RedirectResponse(f"{self.root_path}/label", 303)
        answer.set_cookie(self.cookie, self.launch, path=f"{self.root_path}/", httponly=True, samesite="strict")
        return answer

    def _own(self, origin: str, host: str) -> bool:
        there = urlsplit(origin)
        if there.scheme not in ("http", "https"):
            return False
        return there.netloc == host or (there.hostname or "") in self.hosts


def host_name(host: str) -> str:
    """A Host header without its port, in lower case."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


class Guard:
    """ASGI middleware: everything goes through the door."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # neither websockets nor lifespan events are anybody's here
        headers = Headers(scope=scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    sent.setdefault(name, value)  # a report has a policy of its own
                sent.setdefault("cache-control", "no-store")
            await send(message)

        query = scope.get("query_string", b"").decode("latin-1")
        answer = self.door.entering(scope["path"], query, headers)
        answer = answer or self.door.refusal(scope["method"], headers, HTTPConnection(scope).cookies)
        await (answer or self.app)(scope, receive, with_headers)
