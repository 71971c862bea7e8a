"""``bitfloor serve``: a model behind OpenAI's API."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from bitfloor.cli.chat import MOST_CONTEXT, Context
from bitfloor.cli.console import print_note
from bitfloor.cli.evaluate import Folder
from bitfloor.cli.generate import Activations, Backend
from bitfloor.cli.quantize import Device
from bitfloor.core.errors import InputError

NEEDED = ("starlette", "uvicorn")


def serve(
    folder: Folder,
    host: Annotated[str, typer.Option("--host", metavar="NAME", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What clients call the model.", show_default="the folder's name"),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", metavar="N", min=0, help="Requests that may wait.")] = 256,
    max_body: Annotated[int, typer.Option("--max-body", metavar="BYTES", min=1, help="Largest request.")] = 4_000_000,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            "--api-key-env", metavar="VARIABLE", help="Environment variable with a key that clients must send."
        ),
    ] = None,
    context: Context = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    activations: Activations = None,
) -> None:
    """Serve a quantized model as OpenAI's API: chat and completions, streaming."""
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise InputError(f"serving needs {' and '.join(missing)}; pip install starlette uvicorn.")
    from bitfloor import api
    from bitfloor.serving.server import Limits, Server, key_from, listen

    key = key_from(api_key_env)
    address = listen(host, port)
    if not address.local:
        guard = "whoever has the key" if key else "everybody who reaches this port, without a key (--api-key-env),"
        print_note(f"warning: {host} is not only this machine: {guard} can use the model, and nothing is encrypted.")
    with address.socket:
        model = api.text_model(
            folder, device=device, backend=backend, activations=activations, context=context or MOST_CONTEXT
        )
        name = name or Path(folder).resolve().name
        if not model.has_chat_template:
            print_note(f"{name} has no chat template: completions only.")
        server = Server(model, name, address, Limits(queue, max_body), key)
        print_note(f"{name} at {address.url}/v1 (Ctrl-C ends)")
        server.serve_forever()
        print_note("stopped.")
