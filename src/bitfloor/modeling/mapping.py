"""The one place that touches transformers' weight conversion: checkpoint tensors -> model parameters.

A checkpoint does not always name or shape its tensors as the module does: a Mixtral checkpoint stores three matrices
per expert where the module has two stacked ones. transformers knows every such rule, so its rules are used, never
repeated. Its loader is not: that one wants the whole model at once. Here a *group* is the smallest unit that can be
converted on its own: the source tensors of one conversion and the parameters they become.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import core_model_loading as rules
from transformers.conversion_mapping import get_model_conversion_mapping

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.modeling.shards import TensorInfo


@dataclass(frozen=True)
class WeightGroup:
    """Source tensors that are converted together.

    Args:
        first: the parameter transformers files the group under.
        sources: source tensor names, in the order they are stacked.
        pattern_of: the rule's pattern each source matched; empty when the group is a plain (re)naming.
        targets: parameter (or buffer) name -> shape it will have.
    """

    first: str
    sources: tuple[str, ...]
    pattern_of: Mapping[str, str]
    targets: Mapping[str, tuple[int, ...]]


class WeightMapping:
    """Plans and performs the conversion of one model's checkpoint.

    Args:
        model: the skeleton, parameters on meta.
        tensors: source tensor name -> header entry.

    Raises:
        InputError: a conversion that transformers itself cannot perform on these tensors.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, TensorInfo]) -> None:
        self._model = model
        try:
            mapping = get_model_conversion_mapping(model)
            self._renamings = [m for m in mapping if isinstance(m, rules.WeightRenaming)]
            converters = [m for m in mapping if isinstance(m, rules.WeightConverter)]
            self._by_pattern = {p: c for c in converters for p in c.source_patterns}
            self._converters = converters
            self.unexpected: list[str] = []
            self.groups = self._plan(tensors)
        except (AttributeError, TypeError, ImportError) as error:
            raise BitfloorError(
                f"transformers' weight conversion no longer works as bitfloor expects ({error}); use the transformers "
                "version bitfloor was tested with (see `bitfloor env`)."
            ) from error

    def _plan(self, tensors: Mapping[str, TensorInfo]) -> list[WeightGroup]:
        known = self._model.state_dict()
        collected: dict[str, dict[str, str]] = {}
        # Natural order of the names: experts are stacked in the order they are seen.
        for name in sorted(tensors, key=rules.dot_natural_key):
            target, pattern = self._rename(name, known)
            if target not in known:
                self.unexpected.append(name)
            else:
                collected.setdefault(target, {})[name] = pattern or ""
        groups = []
        for first, sources in collected.items():
            pattern_of = {s: p for s, p in sources.items() if p}
            if len(sources) > 1 and not pattern_of:
                raise InputError(
                    f"the tensors {', '.join(sources)} would all become {first}; the checkpoint is inconsistent."
                )
            bare = WeightGroup(first, tuple(sources), pattern_of, {})
            shapes = self.convert(bare, lambda n: torch.empty(tensors[n].shape, dtype=torch.float32, device="meta"))
            groups.append(
                WeightGroup(first, tuple(sources), pattern_of, {k: tuple(v.shape) for k, v in shapes.items()})
            )
        return groups

    def _rename(self, name: str, known: dict[str, Any]) -> tuple[str, str | None]:
        prefix = getattr(self._model, "base_model_prefix", None)
        target, pattern = rules.rename_source_key(name, self._renamings, self._converters, prefix, known)
        if target not in known and name in known:
            return name, None
        return target, pattern

    def convert(self, group: WeightGroup, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Turn the sources of one group into parameters.

        Args:
            group: one of ``groups``.
            read: source tensor name -> tensor; called once per source, when it is needed.

        Returns:
            parameter name -> tensor, freshly allocated (a plain renaming hands on what ``read`` returned).

        Raises:
            InputError: shapes that the rule cannot combine.
        """
        if not group.pattern_of:
            return {group.first: read(group.sources[0])}
        converter = copy.deepcopy(self._by_pattern[group.pattern_of[group.sources[0]]])
        for source in group.sources:
            reader: Any = _deferred(read, source)
            converter.add_tensor(group.first, source, group.pattern_of[source], reader)
        try:
            made = converter.convert(group.first, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(
                f"{group.first} cannot be made of {_some(group.sources)}: {str(error).splitlines()[0]}; "
                "the checkpoint does not fit its config.json."
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _deferred(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
