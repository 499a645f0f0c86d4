"""The studio as an ASGI application: pages, pictures, JSON in and out, one stream of events."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from diffusion_align.pictures import CorruptImageError

from .door import REPORT_POLICY, Door, Guard
from .event_stream import EventStream
from .picture_catalogue import Catalogue

#: Bytes of a request's body.
MOST_BODY = 64 * 2**10
TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
#: Name and title of every page, in the order of the menu.
PAGES: Mapping[str, str] = {"label": "Label", "compare": "Compare", "runs": "Runs", "data": "Data"}
#: From a request's JSON object to the answer's; runs in a thread of its own.
Action = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Parts:
    """What the application is made of.

    Attributes:
        report: from the id of a run to its report.html; LookupError where there is none.
        actions: by path below ``api/``; all are asked by POST, as they hand things out or change them.
    """

    door: Door
    catalogue: Catalogue
    stream: EventStream
    report: Callable[[str], bytes]
    actions: Mapping[str, Action]


def build_app(parts: Parts) -> ASGIApp:
    """The application behind its door."""
    web = resources.files("diffusion_align.studio") / "web"
    shell = Environment(autoescape=True).from_string((web / "shell.html").read_text(encoding="utf-8"))
    assets = {
        file.name: (file.read_bytes(), TYPES[file.name.rpartition(".")[2]])
        for file in web.iterdir()
        if file.name.rpartition(".")[2] in TYPES
    }

    async def start(request: Request) -> Response:
        return RedirectResponse(f"{parts.door.root_path}/label", 303)

    async def page(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in PAGES:
            return PlainTextResponse("no such page", 404)
        text = shell.render(
            page=name, title=PAGES[name], pages=PAGES, root=parts.door.root_path, token=parts.door.write
        )
        return Response(text, media_type="text/html")

    async def asset(request: Request) -> Response:
        if request.path_params["name"] not in assets:
            return PlainTextResponse("no such file", 404)
        content, kind = assets[request.path_params["name"]]
        return Response(content, media_type=kind)

    async def picture(request: Request) -> Response:
        try:
            found = await run_in_threadpool(parts.catalogue.read, request.path_params["name"])
        except LookupError as error:
            return PlainTextResponse(str(error.args[0]), 404)
        except CorruptImageError as error:
            return PlainTextResponse(str(error), 422)
        # An id is never given to another picture.
        return Response(found.content, headers={"cache-control": "private, max-age=3600"}, media_type=found.media_type)

    async def report(request: Request) -> Response:
        try:
            found = await run_in_threadpool(parts.report, request.path_params["name"])
        except (LookupError, OSError):
            return PlainTextResponse("no such report", 404)
        return Response(found, headers={"content-security-policy": REPORT_POLICY}, media_type="text/html")

    async def events(request: Request) -> Response:
        last = request.headers.get("last-event-id", "")
        stream = parts.stream.follow(int(last) if last.isdigit() else None)
        return StreamingResponse(stream, headers={"cache-control": "no-store"}, media_type="text/event-stream")

    async def action(request: Request) -> Response:
        do = parts.actions.get(request.path_params["name"])
        if do is None:
            return JSONResponse({"error": "no such action"}, 404)
        try:
            given = json.loads(await _body(request))
            if not isinstance(given, dict):
                raise ValueError("expected a JSON object")
            return JSONResponse(dict(await run_in_threadpool(do, given)))
        except OverflowError as error:
            return JSONResponse({"error": str(error)}, 413)
        except LookupError as error:
            return JSONResponse({"error": str(error.args[0] if error.args else error)}, 404)
        except OSError as error:  # a full disk, a folder that is gone
            return JSONResponse({"error": str(error)}, 404 if isinstance(error, FileNotFoundError) else 507)
        except (ValueError, TypeError, RecursionError) as error:
            return JSONResponse({"error": str(error)}, 400)

    routes = [
        Route("/", start, methods=["GET"]),
        Route("/assets/{name}", asset, methods=["GET"]),
        Route("/picture/{name}", picture, methods=["GET"]),
        Route("/report/{name}", report, methods=["GET"]),
        Route("/api/events", events, methods=["GET"]),
        Route("/api/{name}", action, methods=["POST"]),
        Route("/{name}", page, methods=["GET"]),
    ]
    return Guard(Starlette(routes=routes), parts.door)


async def _body(request: Request) -> bytes:
    """The whole body.

    Raises:
        OverflowError: it is too long.
    """
    found = b""
    async for chunk in request.stream():
        found += chunk
        if len(found) > MOST_BODY:
            raise OverflowError(f"expected at most {MOST_BODY} bytes")
    return found
