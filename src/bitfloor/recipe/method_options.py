"""Options of a method, checked against the dataclass that declares them, with its defaults filled in.

The only module of this folder that looks at the methods; what lists or shows recipes does without it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bitfloor.core.errors import InputError
from bitfloor.methods.options import OPTIONS
from bitfloor.recipe.schema import MethodChoice, Recipe, check_value, unknown_key


def resolve_options(recipe: Recipe, origin: str) -> Recipe:
    """The same recipe with every option of its method written out, so that the hash covers defaults too.

    Options that came later, with what was done before as default, are written where they differ from that.

    Raises:
        InputError: unknown method, unknown option, or a value the option does not take.
    """
    config = build_config(recipe.method, origin)
    options = {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default or not field.metadata.get("later")
    }
    return recipe.model_copy(update={"method": MethodChoice(name=recipe.method.name, **options)})


def build_config(choice: MethodChoice, origin: str) -> Any:
    """The method's ``Config`` instance for these options.

    Raises:
        InputError: as in :func:`resolve_options`.
    """
    if choice.name not in OPTIONS:
        close = difflib.get_close_matches(choice.name, OPTIONS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        names = ", ".join(sorted(OPTIONS))
        raise InputError(f"{origin}: unknown method {choice.name!r}; {hint}known methods: {names}.")
    config: Any = OPTIONS[choice.name]
    hints = get_type_hints(config)
    known = [field.name for field in dataclasses.fields(config)]
    for key in choice.options:
        if key not in known:
            raise InputError(f"{origin}: {unknown_key(f'method.{key}', known)} (method {choice.name}).")
    choices: dict[str, tuple[str, ...]] = getattr(config, "CHOICES", {})
    values = {
        key: _checked(f"method.{key}", Literal[choices[key]] if key in choices else hints[key], value, origin)
        for key, value in choice.options.items()
    }
    try:
        return config(**values)
    except InputError as error:
        raise InputError(f"{origin}: method {choice.name}: {error}") from error
    except ValueError as error:
        raise InputError(f"{origin}: method {choice.name}: {str(error).rstrip('.')}; change the option.") from error


def _checked(path: str, annotation: Any, value: Any, origin: str) -> Any:
    try:
        return check_value(annotation, value)
    except ValueError:
        shown = json.dumps(value, default=str)
        raise InputError(f"{origin}: {path} = {shown} is not allowed; use {_in_words(annotation)}.") from None


def _in_words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    branches = get_args(annotation) or (annotation,)
    return " or ".join(names.get(branch, str(branch)) for branch in branches)
