"""The server as a program: a socket that is surely ours, an application on it, and an end that is clean."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass

import uvicorn

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.runtime.text_model import TextModel
from bitfloor.serving.app import App, Policy
from bitfloor.serving.worker import Worker

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
WAITING_CONNECTIONS = 1024  # that the system holds until they are accepted
CLOSING_SECONDS = 5.0  # for answers that are being sent when the server ends


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Args:
        socket: bound and listening.
        url: by which it is reached from this machine.
        local: whether only this machine can reach it.
    """

    socket: socket.socket
    url: str
    local: bool


def listen(host: str, port: int) -> Address:
    """Take a port, before anything expensive is done.

    Args:
        host: name or address.
        port: 0 for any that is free.

    Raises:
        InputError: the host is none of this machine's.
        BitfloorError: the port is taken, or not for us.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all.") from error
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(WAITING_CONNECTIONS)  # now, because two sockets may be bound to a port and only one can listen
    except (OSError, OverflowError) as error:
        made.close()
        raise _refused(host, port, error) from error
    found, taken = made.getsockname()[:2]
    shown = f"[{found}]" if ":" in found else found
    return Address(made, f"http://{shown}:{taken}", ipaddress.ip_address(found.partition("%")[0]).is_loopback)


def _refused(host: str, port: int, error: Exception) -> BitfloorError:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return BitfloorError(f"port {port} of {host} is in use; choose another one with --port.")
    if number == errno.EACCES:
        return BitfloorError(f"port {port} may not be used without more rights; choose one above 1023 with --port.")
    if number == errno.EADDRNOTAVAIL:
        return InputError(f"--host {host} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all.")
    return BitfloorError(f"port {port} of {host} cannot be used ({error}); choose another one with --port.")


def key_from(variable: str | None) -> str | None:
    """The API key that an environment variable holds; None where none is wanted.

    Raises:
        InputError: the variable is empty, so everybody would be let in.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"--api-key-env {variable}: that variable is empty; put the key into it.")
    return key


@dataclass(frozen=True)
class Limits:
    """What is too much.

    Args:
        waiting: requests in the queue.
        body: bytes of a request.
    """

    waiting: int = 256
    body: int = 4_000_000


class Server(uvicorn.Server):
    """Serves one model until it is told to stop, by a signal or by ``should_exit``.

    Args:
        model: nobody else may use it meanwhile.
        name: that clients ask for.
        address: where to listen.
        limits: what is refused.
        api_key: what clients must send, None: nothing.
    """

    def __init__(
        self, model: TextModel, name: str, address: Address, limits: Limits, api_key: str | None = None
    ) -> None:
        self._worker = Worker(model, limits.waiting)
        self._address = address
        names = LOCAL_NAMES | {address.url.removeprefix("http://").rpartition(":")[0]} if address.local else None
        app = App(self._worker, Policy(name, limits.body, api_key, names))
        config = uvicorn.Config(
            app.routes(),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(CLOSING_SECONDS),
        )
        super().__init__(config)

    def serve_forever(self) -> None:
        """Answer requests until the end, which a signal brings without being passed on."""
        try:
            self.run(sockets=[self._address.socket])
        except KeyboardInterrupt:
            pass  # what ended it, raised once more after everything was closed
        finally:
            self._worker.close()
            self._worker.join(CLOSING_SECONDS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the running answers first: connections are waited for, and would otherwise last as long as these."""
        self._worker.close()
        await super().shutdown(sockets)
