"""``bitfloor generate``, and the options that it shares with ``chat`` and ``serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from bitfloor.cli.console import print_text
from bitfloor.cli.evaluate import Folder
from bitfloor.cli.quantize import Device

Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="auto|reference|cpu|triton",
        help="What multiplies packed weights: kernels where there are some, torch, or those kernels and nothing else.",
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        "--activations",
        metavar="float|int8",
        help="int8 rounds what packed weights are multiplied by: faster, not exact.",
        show_default="float",
    ),
]


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="How many to add.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Send PROMPT as a message and print the reply alone.")] = False,
    device: Device = "cpu",
    backend: Backend = "auto",
    activations: Activations = None,
) -> None:
    """Continue a prompt with a quantized model."""
    from bitfloor import api

    text = api.generate(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        device=device,
        chat=chat,
        backend=backend,
        activations=activations,
    )
    print_text(text if chat else prompt + text)
