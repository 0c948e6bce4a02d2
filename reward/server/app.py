"""The routes of the scoring server: an ASGI application over a batcher.

Every error is `{"error": one line}`; none holds a file's name or a traceback.
"""

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from conf.schema import Serving
from reward.server.batcher import Batcher, Full, NotReady, RowError
from reward.server.meters import Meters
from reward.server.rows import NotJson, rows_of
from reward.turns import BadRow

_log = logging.getLogger(__name__)
_ROUTES = ("/score", "/info", "/health", "/metrics")
_GONE = 499  # nginx's number for a client that did not wait; nobody receives it
_LATER = {"Retry-After": "1"}


def make_app(
    config: Serving,
    key: str | None,
    batcher: Batcher,
    meters: Meters,
    identity: Callable[[], dict[str, Any]],
) -> ASGIApp:
    """The application.

    Args:
        config: the limits.
        key: what `Authorization: Bearer` must hold, None for no check. `/health` is open.
        batcher: scores rows; it is started and closed by the caller.
        meters: what is counted.
        identity: says which model it is; called when it is ready.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    guard = [Depends(_key_check(key))] if key else []

    @app.post("/score", dependencies=guard)
    async def score(request: Request) -> Response:
        scores = await _scored(request, config, batcher)
        found = [score if math.isfinite(score) else None for score in scores]
        body = {"model": identity(), "scores": found, "too_long": found.count(None)}
        return JSONResponse(body)

    @app.get("/info", dependencies=guard)
    async def info() -> Response:
        if batcher.state != "ready":
            raise _not_ready(batcher.state)
        limits = ("timeout", "max_body_bytes", "max_rows", "max_queue")
        return JSONResponse(
            {"model": identity(), "limits": {name: getattr(config, name) for name in limits}}
        )

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": batcher.state}, 200 if batcher.state == "ready" else 503)

    @app.get("/metrics", dependencies=guard)
    async def metrics() -> Response:
        return Response(meters.text(), media_type=meters.content_type)

    @app.exception_handler(AnyHTTPException)
    async def refusal(request: Request, error: AnyHTTPException) -> Response:
        reason = error.detail
        if error.status_code == 404:
            reason = f"there is no such path; there are {', '.join(_ROUTES)}"
        elif error.status_code == 405:
            reason = f"this path takes {(error.headers or {}).get('Allow', 'another method')} only"
        return JSONResponse({"error": reason}, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_GONE)

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "the server failed; its log says more"}, 500)

    return _Account(app, meters)


def _key_check(key: str) -> Callable[[Request], None]:
    wanted = f"Bearer {key}".encode()

    def check(request: Request) -> None:
        given = request.headers.get("Authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, wanted):  # in a time that tells nothing of the key
            raise HTTPException(
                401,
                "the key is missing or wrong: send Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer", "Connection": "close"},
            )

    return check


async def _scored(request: Request, config: Serving, batcher: Batcher) -> list[float]:
    """The scores of a request's rows, or the answer that says why there are none."""
    until = asyncio.get_running_loop().time() + config.timeout
    try:
        async with asyncio.timeout_at(until):
            body = await _body(request, config.max_body_bytes)
    except TimeoutError:
        reason = f"the body was not here within {config.timeout:g} s"
        raise HTTPException(408, reason, {"Connection": "close"}) from None
    try:
        rows = rows_of(body, config.max_rows)
        request.scope["rows"] = len(rows)
        waiting = asyncio.wrap_future(batcher.submit(rows))
    except NotJson as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    except BadRow as error:
        raise HTTPException(422, str(error)) from None
    except Full:
        reason = f"{config.max_queue} rows are all that may wait, and there is no room for {len(rows)} more"
        raise HTTPException(503, reason, _LATER) from None
    except NotReady as error:
        raise _not_ready(str(error)) from None
    leaving = asyncio.ensure_future(_disconnect(request))
    either: set[asyncio.Future[Any]] = {waiting, leaving}
    try:
        left = max(0.0, until - asyncio.get_running_loop().time())
        await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if leaving.done():
            raise ClientDisconnect
        raise HTTPException(504, f"there was no score within {config.timeout:g} s: send fewer rows")
    except RowError as error:
        raise HTTPException(422 if error.is_senders else 500, str(error)) from None
    except NotReady as error:
        raise _not_ready(str(error)) from None
    finally:
        leaving.cancel()
        waiting.cancel()  # its rows leave the queue


async def _body(request: Request, limit: int) -> bytes:
    """The body, read no further than the limit."""
    refusal = HTTPException(413, f"the body has more than {limit} bytes", {"Connection": "close"})
    declared = request.headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise refusal
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise refusal
    return bytes(body)


async def _disconnect(request: Request) -> None:
    """Return when the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _not_ready(state: str) -> HTTPException:
    reasons = {
        "loading": "the model is being loaded",
        "failed": "the scoring thread has ended: restart the server",
    }
    return HTTPException(503, reasons.get(state, "the server is stopping"), _LATER)


class _Account:
    """Counts every request, and logs it in a line without any of its text."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app = app
        self._meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = _GONE, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - start
            route = scope["path"] if scope["path"] in _ROUTES else "other"
            self._meters.requests.labels(route, str(status)).inc()
            if route == "/score":
                self._meters.seconds.observe(seconds)
            rows = f", {scope['rows']} rows" if "rows" in scope else ""
            _log.info("%s %d%s, %.0f ms", route, status, rows, 1000 * seconds)
