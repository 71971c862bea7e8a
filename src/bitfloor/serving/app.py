"""The routes: bodies are read within limits, answered through the worker, and given up when their client is gone."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bitfloor.runtime.stream import Ending, Piece
from bitfloor.serving.errors import ApiError, wrong
from bitfloor.serving.replies import DONE, Reply, as_event, as_json, model_card
from bitfloor.serving.requests import Ask, parse_chat, parse_completion, read_json
from bitfloor.serving.worker import Event, Job, Started, Worker, closing

BODY_SECONDS = 60.0  # in which a body must have come


@dataclass(frozen=True)
class Policy:
    """Who is answered.

    Args:
        model: the name the model is served under.
        max_body: most bytes of a request's body.
        api_key: what clients must send, None: nothing.
        names: of this machine, in small letters; requests addressed to another one are refused. None: any. A page in a
            browser can make its own name point to this machine, and would then be allowed to read the answers.
    """

    model: str
    max_body: int
    api_key: str | None = None
    names: frozenset[str] | None = None


class App:
    """The application.

    Args:
        worker: owns the model.
        policy: who is answered.
    """

    def __init__(self, worker: Worker, policy: Policy) -> None:
        self._worker = worker
        self._policy = policy
        self._since = int(time.time())

    def routes(self) -> Starlette:
        """As an ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._posted(parse_chat), methods=["POST"]),
                Route("/v1/completions", self._posted(parse_completion), methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{name:path}", self._model, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
            ],
            exception_handlers={ApiError: _told, HTTPException: _no_such_route},
        )

    def _posted(self, parse: Callable[[dict[str, Any], str], Ask]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Answer:
            self._admit(request)
            content = read_json(await self._body(request))
            ask = parse(content, self._policy.model)
            return Answer(ask, self._worker, Reply(ask.chat, self._policy.model, ask.include_usage))

        return endpoint

    async def _models(self, request: Request) -> Response:
        self._admit(request)
        return _document({"object": "list", "data": [model_card(self._policy.model, self._since)]})

    async def _model(self, request: Request) -> Response:
        self._admit(request)
        name = request.path_params["name"]
        if name != self._policy.model:
            message = f"The model {name!r} does not exist here; this server has {self._policy.model!r}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return _document(model_card(name, self._since))

    async def _health(self, request: Request) -> Response:
        del request
        return _document({"status": "ok", "running": self._worker.running, "queued": self._worker.waiting})

    def _admit(self, request: Request) -> None:
        """Refuse who may not ask.

        Raises:
            ApiError: with the reason.
        """
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._policy.names is not None and name.lower() not in self._policy.names:
            message = (
                f"This server answers as localhost and not as {host!r}; start it with another --host to be reached."
            )
            raise ApiError(403, message, code="unknown_host")
        if self._policy.api_key is None:
            return
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent.encode(), self._policy.api_key.encode()):
            raise ApiError(401, "The API key is missing or wrong; send it as a bearer token.", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        """The body of a request, within the limits of size and time.

        Raises:
            ApiError: it is not announced as JSON, too large, or too slow.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Anything else a page in a browser may send anywhere without asking first.
            raise ApiError(415, f"The Content-Type is {kind or 'missing'}; send application/json.")
        most = self._policy.max_body
        too_large = ApiError(413, f"The body is larger than {most:,} bytes; send less, or raise --max-body.")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > most:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    data += piece
                    if len(data) > most:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, f"The body did not come within {BODY_SECONDS:.0f} seconds.") from error
        except ClientDisconnect as error:
            raise wrong(None, "The body broke off.") from error
        except asyncio.CancelledError as error:
            raise closing() from error  # the server ends, and does not wait for slow clients
        return bytes(data)


class Answer:
    """What an endpoint returns: runs a job and sends what it makes, whole or as a stream.

    Args:
        ask: the request.
        worker: answers it.
        reply: shapes the answer.
    """

    def __init__(self, ask: Ask, worker: Worker, reply: Reply) -> None:
        self._ask = ask
        self._worker = worker
        self._reply = reply
        self._prompt_tokens = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop as soon as the client has gone."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended before the worker noticed
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(self._ask, emit)
        self._worker.submit(job)
        speaking = asyncio.ensure_future(self._speak(events, scope, receive, send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({speaking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._worker.cancel(job)
            leaving.cancel()
            if not speaking.done():
                speaking.cancel()
            with suppress(asyncio.CancelledError):
                await speaking

    async def _speak(self, events: asyncio.Queue[Event], scope: Scope, receive: Receive, send: Send) -> None:
        try:
            started = await _next(events)  # the status is known now
            assert isinstance(started, Started)
            self._prompt_tokens = started.prompt_tokens
            if self._ask.stream:
                await self._send_events(events, send)
                return
            response = _document(await self._whole(events))
        except ApiError as error:
            response = _error(error)
        await response(scope, receive, send)

    async def _whole(self, events: asyncio.Queue[Event]) -> dict[str, Any]:
        text = ""
        async for piece in _pieces(events):
            text += piece.text
        assert piece.ended is not None
        return self._reply.whole(text, piece.ended, self._prompt_tokens, piece.new_tokens)

    async def _send_events(self, events: asyncio.Queue[Event], send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for chunk in self._chunks(events):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            last = DONE
        except ApiError as error:
            last = as_event(error.body())
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _chunks(self, events: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
        if (begin := self._reply.begin()) is not None:
            yield as_event(begin)
        ended: Ending | None = None
        async for piece in _pieces(events):
            if piece.text:
                yield as_event(self._reply.part(piece.text))
            ended = piece.ended
        assert ended is not None
        yield as_event(self._reply.end(ended))
        if self._ask.include_usage:
            yield as_event(self._reply.usage(self._prompt_tokens, piece.new_tokens))


async def _next(events: asyncio.Queue[Event]) -> Started | Piece:
    event = await events.get()
    if isinstance(event, ApiError):
        raise event
    return event


async def _pieces(events: asyncio.Queue[Event]) -> AsyncIterator[Piece]:
    while True:
        piece = await _next(events)
        assert isinstance(piece, Piece)
        yield piece
        if piece.ended is not None:
            return


async def _gone(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _document(content: Any, status: int = 200) -> Response:
    return Response(as_json(content), status, media_type="application/json")


def _error(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    response = _document(error.body(), error.status)
    response.headers.update(headers or {})
    return response


async def _told(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return _error(error)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reasons = {404: "There is no such route", 405: f"This route does not take {request.method}"}
    message = f"{reasons.get(error.status_code, error.detail)}: {request.url.path}."
    return _error(ApiError(error.status_code, message), error.headers)  # Allow, with 405
