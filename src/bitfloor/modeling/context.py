"""How many tokens a model was made for."""

from __future__ import annotations

from typing import Any


def context_length(model: Any) -> int | None:
    """Tokens the model was made for, or None when its config does not say.

    Args:
        model: anything with a transformers ``config``.
    """
    length = getattr(text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def text_config(model: Any) -> Any:
    """The part of a model's config that is about text; the whole one for a model of text alone."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
